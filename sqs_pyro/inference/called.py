"""What is called in inference: any callable of Pyro's, with the arguments of the model."""

from collections.abc import Callable
from typing import Any, TypeAlias

#: A model or a guide: it samples sites, whatever it takes and returns.
PyroCallable: TypeAlias = Callable[..., Any]
#: Positional and keyword arguments of model and guide: the data, whole or a minibatch.
Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]
