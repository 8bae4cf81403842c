"""Run something when another library is imported, without importing it.

transformers finds quantization methods in a table that a method's own library fills; it has no entry points. A
user who writes ``import sqs_pyro`` must find packed checkpoints readable, but must not pay for the import of
transformers, which may not even be installed. So the entry is made when the module that holds the table has been
imported: now, if it is there already, else right after its own code has run.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(name: str, action: Callable[[], None]) -> None:
    """Call ``action`` once, when the module ``name`` has been imported; at once, if it has been.

    What ``action`` raises comes out of the import.
    """
    module = sys.modules.get(name)
    # A module is in sys.modules from the start of its import, before its table is there.
    if module is not None and not _is_being_imported(module):
        action()
    else:
        # First: whichever finder comes before would find the module, and ours would never be asked.
        sys.meta_path.insert(0, _Watch(name, action))


def _is_being_imported(module: ModuleType) -> bool:
    return getattr(module.__spec__, "_initializing", False)


class _Watch(MetaPathFinder):
    """First of the finders: lets the others find the module, and has its loader call the action afterwards."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of the watched module; None for all others."""
        if fullname != self.name:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]  # those before it have been asked already
        # Lazily: finders behind the one that knows the module are not asked, as in an import without us.
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        # The loader stays what it is, because tools ask it for sources: only this one method is covered.
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:  # a module that is reloaded needs nothing more
                sys.meta_path.remove(self)
            self.action()

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
