"""Who owns a parameter: the module. Pyro's global store is a view of it, brought up to date before every use.

Pyro finds parameters by name in one store for the whole process, so that two networks with equal names would
share them, and a module would not know what was loaded into the store. Here a name in the store leads to the
parameter of the module that was used last. What else is found under the name

* is another module's parameter: that module keeps it, and is given its name back when it is used again;
* is nobody's: it was loaded (``store.load``, ``set_state``, ``store[name] = value``) and is taken over by the
  module, in place, so that optimizers go on with the parameters they know.

What says how parameters are read (masks, codes, the stage of training, statistics of batch norms) are buffers. The
store shows those that a module names, too, so that what was saved is whole; no optimizer sees them.
"""

import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

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

    Reading a parameter, :meth:`named_parameters`, ``state_dict`` and pickling take over what was loaded first;
    so does ``load_state_dict``, which is then the last word.
    """

    #: Buffers that the store shows.
    stored_buffers: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        # Hooks, not overrides: torch loads a submodule without calling its `load_state_dict`.
        self.register_state_dict_pre_hook(_before_state_dict)
        self.register_load_state_dict_pre_hook(_before_loading)

    def __getattr__(self, name: str) -> Any:
        self._claim(name)  # first: what is read below may have been loaded into the store
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Before Module.__init__ there is no `_pyro_params`, and nothing to settle.
        kept = name in self.stored_buffers or name in self.__dict__.get("_pyro_params", ())
        if kept:
            self._claim(name)  # what was loaded before is past
        super().__setattr__(name, value)
        if kept and self._uses_store() and self._is_in_store():  # who saves the store next saves it whole
            self._claim(name, put=True)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what torch's does, with the values that were loaded last.

        Raises:
            NetworkError: what was loaded has another shape.
        """
        for module in self.modules():  # optimizers are made of what this yields
            if isinstance(module, OwningModule):
                module.take_loaded()
        yield from super().named_parameters(*args, **kwargs)

    def take_loaded(self) -> None:
        """Take over what was loaded into Pyro's store under the names of this module's own parameters.

        Raises:
            NetworkError: it has another shape.
        """
        for name in (*self.__dict__.get("_parameters", ()), *self.stored_buffers):
            self._claim(name)

    def _claim(self, name: str, put: bool = False) -> None:
        """Settle with the store who owns the parameter behind an attribute, if it is one.

        Args:
            name: of the attribute.
            put: enter it into the store in any case, else only while Pyro runs the module.
        """
        state = self.__dict__  # attributes of the module itself would come back here
        if not self._uses_store():
            return
        put = put or self._pyro_context.active > 0  # as PyroModule enters parameters: while it is called
        name = name.removesuffix(_UNCONSTRAINED)
        if name in self.stored_buffers:
            self._claim_buffer(name, put)
            return
        if name in state["_pyro_params"]:  # constrained: the module keeps the unconstrained one
            parameter, constraint = state["_parameters"].get(name + _UNCONSTRAINED), state["_pyro_params"][name][0]
        else:
            parameter, constraint = state.get("_parameters", {}).get(name), constraints.real
        if parameter is not None:
            claim(self, f"{state['_pyro_name']}.{name}", parameter, constraint, put=put)

    def _uses_store(self) -> bool:
        """Return False where there is no name yet, or where Pyro keeps parameters local and uses no store."""
        return bool(self.__dict__.get("_pyro_name")) and not pyro.settings.get("module_local_params")

    def _claim_buffer(self, name: str, put: bool) -> None:
        """Take over what was loaded for a buffer, and let the store show the module's own."""
        shown = f"{self._pyro_name}.{name}"
        loaded = loaded_buffer(shown)
        if loaded is not None:
            self._take_over_buffer(name, loaded)  # masks and codes decide how parameters are read
        if put or loaded is not None:
            show_buffer(self, shown, self._buffers[name])

    def _take_over_buffer(self, name: str, loaded: Tensor) -> None:
        """Replace a buffer by what was loaded for it.

        Raises:
            NetworkError: it has another shape.
        """
        own = self._buffers[name]
        if own is not None:
            _check_shape(f"{self._pyro_name}.{name}", loaded, own)
            loaded = loaded.to(own)  # dtype and device stay the module's
        self._buffers[name] = loaded.detach().clone()  # the store's tensor is somebody else's to change

    def _is_in_store(self) -> bool:
        """Return whether the store shows anything of this module."""
        params, held = pyro.get_param_store()._params, {**self._parameters, **self._buffers}
        names = (f"{self._pyro_name}.{name.removesuffix(_UNCONSTRAINED)}" for name in held)
        return any(_owner_of(params[name]) is self for name in names if name in params)


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
    if found is parameter:  # the usual case, at every access
        _owners.setdefault(parameter, weakref.ref(owner))
        return
    # Every parameter that a module has put there is in `_owners`: what is not came from outside.
    loaded = found is not None and not _is_owned(found)
    if loaded:
        _take_over(name, parameter, constraint, found, store._constraints[name])
    if not (loaded or put):
        return  # another module's name stays its own until this one is used
    if found is not None and _owner_of(found) is None:
        del store[
            name
        ]  # the store remembers names of parameters, for optimizers; of those without an owner no more
    # Past `store[name] = ...`, which would make a new parameter that optimizers do not know.
    store.set_state({"params": {name: parameter}, "constraints": {name: constraint}})
    _owners[parameter] = weakref.ref(owner)


def loaded_buffer(name: str) -> Tensor | None:
    """Return what was loaded into the store under the name of a buffer, None if nothing was."""
    found = pyro.get_param_store()._params.get(name)
    return None if found is None or _is_owned(found) else found


def show_buffer(owner: nn.Module, name: str, buffer: Tensor | None) -> None:
    """Let the store show a buffer, by another tensor of the same memory: Pyro marks what it hands out."""
    store = pyro.get_param_store()
    found = store._params.get(name)
    if found is not None:
        if _owner_of(found) is owner and _same_memory(found, buffer):
            return
        del store[name]  # what is shown is not overwritten in place: it may be another module's memory
    if buffer is not None:
        alias = buffer.detach()  # the same memory
        # set_state adds to what the store has, and marks nothing.
        store.set_state({"params": {name: alias}, "constraints": {name: constraints.real}})
        _owners[alias] = weakref.ref(owner)


def take_over_in_place(name: str, buffer: Tensor) -> None:
    """Write what was loaded for a buffer into it.

    Raises:
        NetworkError: it has another shape.
    """
    loaded = loaded_buffer(name)
    if loaded is None:
        return
    _check_shape(name, loaded, buffer)
    with torch.no_grad():
        if not torch.equal(loaded.to(buffer), buffer):  # buffers may be expanded, and are not written to then
            buffer.copy_(loaded)


def point_estimate(owner: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """Return ``pyro.param(name)`` of a module's parameter: the value to use, which effects may have replaced."""
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


def _before_loading(module: OwningModule, *args: Any) -> None:
    module.take_loaded()


def _same_memory(found: Tensor, own: Tensor | None) -> bool:
    # The store shows aliases, other objects of the same memory.
    if own is None or found.shape != own.shape:
        return False
    # Of a DTensor, which has no memory of its own, it is that of this rank's part.
    found, own = (each.to_local() if hasattr(each, "to_local") else each for each in (found, own))
    return found.data_ptr() == own.data_ptr()


def _owner_of(found: Tensor) -> nn.Module | None:
    known = _owners.get(found)
    return None if known is None else known()


def _is_owned(found: Tensor) -> bool:
    """Return whether a module has it, or had: ours, or one that is not ours and has trained it."""
    # A gradient: a module that is not ours, trained by Pyro; it keeps its parameter.
    return found in _owners or found.grad is not None


def _take_over(name: str, parameter: Tensor, constraint: Any, found: Tensor, its_constraint: Any) -> None:
    _check_shape(name, found, parameter)
    with torch.no_grad():
        wanted, given = transform_to(constraint), transform_to(its_constraint)
        # In place; equal constraints spare the rounding of there and back.
        parameter.copy_(found if wanted == given else wanted.inv(given(found)))


def _check_shape(name: str, found: Tensor, own: Tensor) -> None:
    if found.shape != own.shape:
        raise NetworkError(
            f"Pyro's parameter store holds '{name}' of shape {list(found.shape)}, but this module's is of shape "
            f"{list(own.shape)}: load the parameters of this very network and guide, or call "
            "pyro.clear_param_store()."
        )
