"""What a call came to, in a form that can be compared: values bit by bit, or the sentence that refused it."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.errors import SQSError


def outcome(call: Callable[..., Any], **arguments: Any) -> Any:
    """What the call returns, comparable, or what it says where it refuses its arguments."""
    try:
        return comparable(call(**arguments))
    except (SQSError, ValueError) as refusal:
        return "refused", str(refusal)


def comparable(value: Any) -> Any:
    """Tensors by their bits, networks by their state, dataclasses and containers by what is in them."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().flatten()
        bits = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        return str(value.dtype), tuple(value.shape), hashlib.sha256(bits).hexdigest()
    if isinstance(value, nn.Module):
        return type(value).__name__, comparable(value.state_dict())
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if field.name != "seconds"]
        return type(value).__name__, comparable({name: getattr(value, name) for name in names})
    if isinstance(value, Mapping):
        return tuple((str(key), comparable(each)) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(comparable(each) for each in value)
    return repr(value)
