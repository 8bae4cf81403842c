"""Kinds of runs: what a recipe's kind decides is decided by one class, and a recipe's keys say which.

A new kind is one file with a subclass of :class:`RunKind`, and one :func:`register_kind`. A kind's module is
imported when a recipe, or a file, of that kind is met.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from torch import nn

from sqs_pyro import from_pretrained, load, size_report
from sqs_pyro.documents import read_yaml
from sqs_pyro.errors import DataError, PackedFileError, RecipeError
from sqs_pyro.fingerprint import Fingerprint
from sqs_pyro.integrations.checkpoint_size import checkpoint_report, packed_document
from sqs_pyro.integrations.pretrained import quiet, transformers_package
from sqs_pyro.networks.registry import build_network
from sqs_pyro.networks.tokens import vocabulary_size
from sqs_pyro.packing.file import read_packed
from sqs_pyro.packing.size import SizeReport
from sqs_pyro.recipes import parse
from sqs_pyro.runs.bookkeeping import Progress, chosen_device, silent
from sqs_pyro.runs.recipe import Goal, WholeRecipe, changed

Recipe = TypeVar("Recipe", bound=WholeRecipe)
Document = Mapping[str, Any]
"""A recipe as plain data: read from YAML, or kept in a packed file, where any program may have written it."""


@dataclass(frozen=True)
class OpenedFile:
    """A packed file, or packed Hugging Face directory, and what is said of it beside what it says itself.

    Attributes:
        path: of the file or directory.
        document: the recipe that it holds, or the one that was given in its place.
        network: name of its network that the user gave, whose code may run then; None: what the file says.
        device: where the network shall run, see :func:`~sqs_pyro.runs.bookkeeping.chosen_device`.
        given: whether the user gave the document, whose code may run then.
    """

    path: Path
    document: Document
    network: str | None = None
    device: str = "cpu"
    given: bool = False

    @property
    def metadata(self) -> Document:
        """What was kept with the weights: ``network``, ``recipe``, ``metrics``."""
        if not self.path.is_dir():
            return read_packed(self.path).metadata
        found = packed_document(self.path).get("metadata")
        return found if isinstance(found, Mapping) else {}

    def size(self) -> SizeReport:
        """Return its bytes, by part."""
        return checkpoint_report(self.path) if self.path.is_dir() else size_report(self.path)

    def load(self) -> nn.Module:
        """Return the packed network, built as its metadata says or as the user does.

        Raises:
            PackedFileError: the file is not intact, or does not say how to build its network.
            RecipeError: there is no such network, or not with these options.
        """
        device = chosen_device(self.device)
        if self.path.is_dir():
            if self.network is not None:
                raise PackedFileError(
                    f"'{self.path}' is a Hugging Face directory, whose config.json names its network: leave "
                    "--network out."
                )
            with quiet(transformers_package(), self.path):
                return from_pretrained(self.path).to(device)
        if self.network is None:
            return load(self.path).to(device)
        said = self.metadata.get("network")
        # The options that it was built with are the file's, if the name is.
        options = said.get("options") if isinstance(said, Mapping) and said.get("name") == self.network else {}
        net = build_network(self.network, **(options if isinstance(options, dict) else {}))
        return load(self.path, net).to(device)


@dataclass(frozen=True)
class InputForm:
    """What random inputs of a network look like.

    Attributes:
        shapes: of one example, each to be tried by itself: ``(C, H, W)`` or ``(tokens,)``.
        vocabulary: tokens that the network knows; None: it takes numbers.
        masked: whether it takes its tokens as a mapping with an attention mask.
    """

    shapes: tuple[tuple[int, ...], ...]
    vocabulary: int | None = None
    masked: bool = False


class RunKind(ABC, Generic[Recipe]):
    """What is done with recipes of one kind, and with the packed files that hold them.

    Attributes:
        recipe: class of its recipes.
        said: what such a recipe is, for sentences.
        in_studies: whether studies take it: :meth:`made_of` and :meth:`baseline_key` are then there.
        on_ranks: whether :meth:`run` may be called on ranks, on all of them.
    """

    recipe: type[Recipe]
    said: str
    in_studies = False
    on_ranks = False

    def parse(self, document: Document, where: str = "") -> Recipe:
        """Validate a whole recipe.

        Raises:
            RecipeError: a key or value is wrong; the sentence names it, behind ``where``.
        """
        return parse(self.recipe, document, where)

    @abstractmethod
    def run(
        self,
        recipe: Recipe,
        out_dir: str | Path,
        *,
        overwrite: bool = False,
        baselines_dir: str | Path | None = None,
        progress: Progress = silent,
    ) -> dict[str, Any]:
        """Carry a recipe out: a run directory with the packed file, and what ``metrics.json`` in it holds.

        Args:
            recipe: what to do.
            out_dir: directory to make.
            overwrite: replace a finished run that is there.
            baselines_dir: where trained fp32 networks are kept.
            progress: called often, for a progress bar.
        """

    @abstractmethod
    def evaluate(
        self, file: OpenedFile, *, root: str | Path | None = None, shift: str | None = None
    ) -> dict[str, Any]:
        """Rebuild the network of a packed file, and judge it as a run of this kind judges it.

        Args:
            file: packed file, and the recipe that says by which data.
            root: directory of the data set on this machine, instead of the recipe's.
            shift: what is done to images first.
        """

    def uncertainty(
        self,
        file: OpenedFile,
        *,
        root: str | Path | None = None,
        foreign: Sequence[str] = (),
        shifts: Sequence[str] = (),
        draws: int | None = None,
    ) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """Return what the uncertainty of a packed file's network is worth, and what is drawn of it.

        Args:
            file, root: as of :meth:`evaluate`.
            foreign: data sets of other classes.
            shifts: what is done to images, each by itself.
            draws: of an ensemble, how many are averaged; None: all.

        Raises:
            DataError: networks of this kind are no classifiers of images.
        """
        raise DataError(
            f"'{file.path}' holds {self.said}, but uncertainty is told of classifiers of images: give a file of "
            "one, or call sqs_pyro.evaluation.predictive in Python."
        )

    def network(self, file: OpenedFile) -> nn.Module:
        """Return the packed network of a file, built as its user, its metadata or its recipe says.

        Raises:
            PackedFileError: neither says how.
            NetworkError: the network's checkpoint is missing.
        """
        if file.path.is_dir() or file.network is not None or file.metadata.get("network") is not None:
            return file.load()
        plain = self.plain_network(file.document)
        if plain is None:
            raise PackedFileError(
                f"Packed file '{file.path}' does not say how to build its network: give --network with the name "
                "of what builds it, or load it in Python with the network's constructor."
            )
        return load(file.path, plain).to(chosen_device(file.device))

    def plain_network(self, document: Document) -> nn.Module | None:
        """Return the network that a recipe names, for a packed file to fill; None: it names none."""
        return None

    @abstractmethod
    def example(self, net: nn.Module, file: OpenedFile) -> tuple[Any, str]:
        """Return inputs to trace a file's network with, at least two rows, and where they come from."""

    @abstractmethod
    def input_form(
        self,
        net: nn.Module,
        file: OpenedFile,
        image_shape: tuple[int, ...] | None,
        lengths: Sequence[int],
    ) -> InputForm:
        """Return what to time a file's network with.

        Args:
            net: the network, made ready to be timed.
            file: where it comes from.
            image_shape: instead of the shape of the recipe's data.
            lengths: of texts, in tokens.
        """

    def tokenizer(self, file: OpenedFile) -> Any:
        """Return the tokenizer of a packed file's network, which continues texts.

        Raises:
            DataError: networks of this kind do not.
            NetworkError: it is missing.
        """
        raise DataError(f"'{file.path}' holds {self.said}, but text is continued by language models: give one.")

    def plan(
        self, recipe: Recipe, *, ranks: int = 1, device_memory: float | None = None, machine: str = "cpu"
    ) -> dict[str, Any]:
        """Return the memory and the time that a run is going to take, as a document; see docs/cli.md.

        Args:
            recipe: of the run.
            ranks: how many share it.
            device_memory: bytes that each has.
            machine: name of what they run on.

        Raises:
            RecipeError: it cannot be told.
        """
        raise RecipeError(
            f"A plan tells the memory of compression block by block, but this is {self.said}: give a recipe with "
            "the key 'blockwise', or a checkpoint."
        )

    def sized(self, recipe: Recipe, goal: Goal) -> dict[str, Any]:
        """Return the keys of a recipe, dotted, and their values with which a file becomes as small as is asked.

        Raises:
            RecipeError: it cannot be said of this kind.
        """
        raise RecipeError(f"This is {self.said}, whose size is not asked for so: change its keys with --set.")

    def made_of(self, recipe: Recipe) -> Fingerprint:
        """Return the fingerprint of what a recipe names: a finished run of a study is of just this."""
        raise NotImplementedError

    def check_comparable(self, recipe: Recipe) -> None:
        """Check that a recipe has the figures that studies compare; raises RecipeError."""

    def baseline_key(self, recipe: Recipe) -> str:
        """Return what is equal for runs of a study that share a trained fp32 network."""
        raise NotImplementedError


class TextKind(RunKind[Recipe]):
    """A kind whose networks are transformers and take tokens.

    Attributes:
        masked: whether a network is called with an attention mask beside its tokens.
    """

    masked: bool

    def transformer(self, net: nn.Module) -> nn.Module:
        """Return the network of transformers in a kind's network."""
        return net

    def refuse_images(self, file: OpenedFile, root: str | Path | None, shift: str | None) -> None:
        """Refuse options of :meth:`evaluate` that are for images."""
        for option, value in (("--root", root), ("--shift", shift)):
            if value is not None:
                raise DataError(
                    f"{option} {value} is for images, but '{file.path}' is judged by text: leave it out."
                )

    def input_form(
        self,
        net: nn.Module,
        file: OpenedFile,
        image_shape: tuple[int, ...] | None,
        lengths: Sequence[int],
    ) -> InputForm:
        """Return the form of tokens, of each length."""
        if image_shape is not None:
            raise RecipeError(
                f"--input-shape is for images, but '{file.path}' takes texts: give --lengths instead."
            )
        owner: Any = self.transformer(net)
        if hasattr(owner.config, "use_cache"):
            owner.config.use_cache = False  # one call of the network is measured, after which nothing follows
        return InputForm(tuple((length,) for length in lengths), vocabulary_size(owner), self.masked)


# ---- the registry ----

# Names, not classes: `sqs` on images must not wait for what language models import.
_KINDS: dict[str, str] = {
    "blockwise": "sqs_pyro.runs.language_model:LanguageModels",
    "task": "sqs_pyro.runs.task:Tasks",
}
# The first kind there was: its recipes and files have no key of their own, and some nothing but `data`.
_WITHOUT_KEY = "sqs_pyro.runs.images:Images"


def register_kind(key: str, where: str) -> None:
    """Add a kind of runs.

    Args:
        key: top-level key that recipes of this kind have, and those of no other.
        where: ``"package.module:Class"``, a subclass of :class:`RunKind`.

    Raises:
        RecipeError: the key tells another kind.
    """
    if _KINDS.setdefault(key, where) != where:  # the same again, by a module that is reloaded, is no mistake
        raise RecipeError(f"Recipes with the key '{key}' are of the kind {_KINDS[key]}: choose another key.")


def kind_of(recipe: Any) -> RunKind[Any]:
    """Return the kind of a recipe, or of a document: what has no kind's key is of images, and checked as such."""
    # a recipe has all keys of its class, a document those that were written: both have the key that tells them
    keys = type(recipe).model_fields if isinstance(recipe, BaseModel) else recipe
    known = keys if isinstance(keys, Mapping) else {}  # a list, a number: its own kind says that it is no recipe
    return _kind_at(next((where for key, where in _KINDS.items() if key in known), _WITHOUT_KEY))


def kinds() -> list[RunKind[Any]]:
    """Return all kinds that there are."""
    return [_kind_at(where) for where in (_WITHOUT_KEY, *_KINDS.values())]


@cache
def _kind_at(where: str) -> RunKind[Any]:
    kind: RunKind[Any] = resolve_name(where)()
    return kind


def load_any_recipe(path: str | Path, changes: Sequence[str] = ()) -> Any:
    """Read and validate a recipe of any kind.

    One with the key ``blockwise`` is a language model's, one with the key ``task`` that of a task.

    Args:
        path: YAML file.
        changes: ``"blockwise.bits=3"``: values to put in place of the file's, in YAML notation.

    Raises:
        RecipeError: the file is missing or is no YAML, or a key or value in it is wrong.
    """
    return parse_any_recipe(changed(read_yaml(Path(path)), changes))


def parse_any_recipe(values: Any) -> Any:
    """Validate a recipe of any kind, from YAML or from a packed file; errors as :func:`load_any_recipe`."""
    return kind_of(values).parse(values)
