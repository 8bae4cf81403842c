"""Who owns a parameter: the module. Pyro's global store is a view of it, brought up to date before every use.

Pyro finds parameters by name in one store for the whole process, so that two networks with equal names would
share them, and a module would not know what was loaded into the store. Here a name in the store leads to the
parameter of the module that was used last. What else is found under the name

* is another module's parameter: that module keeps it, and is given its name back when it is used again;
* is nobody's: it was loaded (``store.load``, ``set_state``, ``store[name] = value``) and is taken over by the
  module, in place, so that optimizers go on with the parameters they know.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints, transform_to
from torch.utils.weak import WeakIdKeyDictionary

from sqs_pyro.errors import NetworkError

_UNCONSTRAINED = "_unconstrained"  # how PyroModule calls the parameter behind a constrained attribute

#: Parameters that modules have put into the store, and their modules; forgotten with the parameters.
_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()


class OwningModule(PyroModule):
    """A :class:`~pyro.nn.PyroModule` that owns its parameters (see above).

    Reading a parameter, :meth:`named_parameters`, ``state_dict`` and pickling take over what was loaded first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_pre_hook(_before_state_dict)

    def __getattr__(self, name: str) -> Any:
        self._claim(name)
        return super().__getattr__(name)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As torch's, of the values that were loaded last.

        Raises:
            NetworkError: what was loaded has another shape.
        """
        for module in self.modules():
            if isinstance(module, OwningModule):
                module.take_loaded()
        yield from super().named_parameters(*args, **kwargs)

    def take_loaded(self) -> None:
        """Take over what was loaded into Pyro's store under the names of this module's own parameters.

        Raises:
            NetworkError: it has another shape.
        """
        for name in tuple(self.__dict__.get("_parameters", ())):
            self._claim(name)

    def _claim(self, name: str) -> None:
        """Settle with the store who owns the parameter behind an attribute, if it is one."""
        state = self.__dict__
        # A module that has no place yet has no name; and with local parameters Pyro does not use the store.
        if not state.get("_pyro_name") or pyro.settings.get("module_local_params"):
            return
        name = name.removesuffix(_UNCONSTRAINED)
        if name in state["_pyro_params"]:
            parameter, constraint = state["_parameters"].get(name + _UNCONSTRAINED), state["_pyro_params"][name][0]
        else:
            parameter, constraint = state.get("_parameters", {}).get(name), constraints.real
        if parameter is not None:
            claim(self, f"{state['_pyro_name']}.{name}", parameter, constraint, put=self._pyro_context.active > 0)


def claim(
    owner: nn.Module, name: str, parameter: Tensor, constraint: Any = constraints.real, *, put: bool = True
) -> None:
    """Make a name in Pyro's store lead to a module's parameter, after taking over what was loaded under it.

    Args:
        owner: the module.
        name: in the store.
        parameter: unconstrained, as the module keeps it.
        constraint: of its value.
        put: enter it into the store; else only what was loaded is taken over.

    Raises:
        NetworkError: what was loaded has another shape.
    """
    store = pyro.get_param_store()
    found = store._params.get(name)
    if found is parameter:
        _owners.setdefault(parameter, weakref.ref(owner))
        return
    loaded = found is not None and not _is_owned(found)
    if loaded:
        _take_over(name, parameter, constraint, found, store._constraints[name])
    if not (loaded or put):
        return
    if found is not None and _owner_of(found) is None:
        del store[
            name
        ]  # the store remembers names of parameters, for optimizers; of those without an owner no more
    store.set_state({"params": {name: parameter}, "constraints": {name: constraint}})
    _owners[parameter] = weakref.ref(owner)


def point_estimate(owner: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """``pyro.param(name)`` of a module's parameter: the value to use, which effects may have replaced."""
    claim(owner, name, parameter)
    value: Tensor = pyro.param(name, parameter)
    if value is parameter:
        # Pyro marks a value with a weak reference, which would keep the user's network from being pickled.
        marked: Any = value
        marked.unconstrained = _Itself(value)
    return value


class _Itself:
    """What ``value.unconstrained`` is where value and parameter are one; a copy of it leads nowhere."""

    def __init__(self, parameter: Tensor | None = None) -> None:
        self._parameter = None if parameter is None else weakref.ref(parameter)

    def __call__(self) -> Tensor | None:
        return None if self._parameter is None else self._parameter()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Itself, ()


def _before_state_dict(module: OwningModule, prefix: str, keep_vars: bool) -> None:
    module.take_loaded()


def _owner_of(found: Tensor) -> nn.Module | None:
    known = _owners.get(found)
    return None if known is None else known()


def _is_owned(found: Tensor) -> bool:
    """Whether a module has it, or had: ours, or one that is not ours and has trained it."""
    return found in _owners or found.grad is not None


def _take_over(name: str, parameter: Tensor, constraint: Any, found: Tensor, its_constraint: Any) -> None:
    if found.shape != parameter.shape:
        raise NetworkError(
            f"Pyro's parameter store holds '{name}' of shape {list(found.shape)}, but this module's is of shape "
            f"{list(parameter.shape)}: load the parameters of this very network and guide, or call "
            "pyro.clear_param_store()."
        )
    with torch.no_grad():
        wanted, given = transform_to(constraint), transform_to(its_constraint)
        parameter.copy_(found if wanted == given else wanted.inv(given(found)))
