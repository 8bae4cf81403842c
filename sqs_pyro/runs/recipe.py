"""The whole recipe of a run: which network, which data, how it is trained and how it is compressed."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import Field, field_validator, model_validator

from sqs_pyro.compression.baseline import BaselineRecipe
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.compression.finetune.search import SearchRecipe, check_searchable
from sqs_pyro.data import DataRecipe
from sqs_pyro.documents import parse_yaml, read_yaml, shown
from sqs_pyro.errors import RecipeError
from sqs_pyro.loggers.recipe import LoggerRecipe
from sqs_pyro.recipes import MAX_SEED, RecipeSection, key_parts, parse

FP32_BITS = 32


class NetworkRecipe(RecipeSection):
    """Which network.

    Attributes:
        name: a registered network; `torchvision/NAME` or `timm/NAME`; a function of yours that builds one,
            `module:function` or `path/file.py:function`; or the Hugging Face directory of a classifier of images,
            whose weights, if there are any, are where it begins.
        options: keyword arguments of its constructor. `num_classes` is the data's where the constructor has it; a
            directory's network gets a new head by it.
    """

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class RunBaselineRecipe(BaselineRecipe):
    """How the network gets its fp32 weights: it is trained once and kept, or read from a file.

    Attributes:
        seed: of initial weights, order of the data, dropout; the run's `seed` unless it is given here.
        checkpoint: a state dict to start from instead of training (`.safetensors`, or a file of `torch.save`
            that holds tensors only). The other keys of this section are then without effect.
        trained: the network has its weights from what builds it, or from its directory, and is not trained; nor
            have the other keys an effect then.
    """

    checkpoint: Path | None = None
    trained: bool = False

    @model_validator(mode="after")
    def _weights_come_from_one_place(self) -> "RunBaselineRecipe":
        if self.trained and self.checkpoint is not None:
            raise ValueError(
                "a section with `checkpoint` or `trained: true`: one says where the weights come from"
            )
        return self


class AveragingRecipe(RecipeSection):
    """Bayesian averaging: the predictions of several networks drawn from the posterior, averaged, and the
    network of the posterior's mean weights.

    Attributes:
        samples: networks drawn.
        temperature: what the logits of gates and codes are divided by: 1 draws from the posterior as its logits
            say, towards 0 draws become the packed network. None takes the best of `candidates`.
        candidates: temperatures to choose from, by the average's NLL on the validation data.
        gate_temperature: the same for gates alone; None lets them follow `temperature`.
        batch_norm_batches: minibatches of training data from which batch-norm statistics are estimated anew for
            each drawn network; 0 gives all those of the packed network, as `pack` does.
        pack: write the drawn networks to `ensemble.safetensors`, one packed file, and evaluate that file.
    """

    samples: int = Field(default=20, ge=1, le=10_000)
    temperature: float | None = Field(default=None, ge=1e-6, le=1e6)
    candidates: tuple[Annotated[float, Field(ge=1e-6, le=1e6)], ...] = Field(
        default=(0.1, 0.2, 0.35, 0.5, 1.0), min_length=1
    )
    gate_temperature: float | None = Field(default=None, ge=1e-6, le=1e6)
    batch_norm_batches: int = Field(default=0, ge=0)
    pack: bool = False

    @model_validator(mode="after")
    def _packed_draws_share_their_norms(self) -> "AveragingRecipe":
        if self.pack and self.batch_norm_batches:
            raise ValueError(
                f"pack: false beside batch_norm_batches {self.batch_norm_batches}: a packed file's draws share "
                "their norms"
            )
        return self


class BoundsRecipe(RecipeSection):
    """How `bounds.json` is measured: bounds on the KL exactly, the KL itself and the likelihood by draws.

    Attributes:
        examples: training examples, the first, on which the likelihood is measured.
        networks: networks drawn for it at each temperature, at most.
        draws: Monte Carlo draws of each weight, at most; large networks get fewer, but at least 2.
        standard_error: of the likelihood, as a share of it, at which no more networks are drawn.
    """

    examples: int = Field(default=64, ge=1)
    networks: int = Field(default=4, ge=2)
    draws: int = Field(default=4, ge=2)
    standard_error: float = Field(default=0.01, ge=0)


@dataclass(frozen=True)
class Goal:
    """How small the file shall be, or what that may cost; one of them is given.

    Attributes:
        ratio: times smaller than the fp32 network.
        megabytes: of the file, 10⁶ bytes.
        bits: of the file, a parameter of the network; of a language model, a compressed weight.
        points: not of the file, but of the task's figure, in hundredths: how much it may lose at most.
    """

    ratio: float | None = None
    megabytes: float | None = None
    bits: float | None = None
    points: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) > 1:
            raise RecipeError(
                f"{' and '.join(f'--{name}' for name in given)} are given, but one decides the size of the file."
            )
        for name, value in given.items():
            if not value > 0:
                raise RecipeError(f"--{name} is {value:g}, but must be above zero.")
        if self.ratio is not None and self.ratio <= 1:
            raise RecipeError(f"--ratio is {self.ratio:g}, but a smaller file needs one above 1.")
        if self.bits is not None and self.bits >= FP32_BITS:
            raise RecipeError(f"--bits is {self.bits:g}, but a smaller file needs fewer than {FP32_BITS}.")

    def __bool__(self) -> bool:
        return any(value is not None for value in vars(self).values())

    def keys(self, fp32_bytes: Callable[[], int]) -> dict[str, Any]:
        """Return the dotted keys of a recipe, and their values, with which a fine-tuned network's file meets this.

        Args:
            fp32_bytes: as of :meth:`ratio_to`.
        """
        if self.points is not None:
            return {"compression.target_ratio": None, "search.points": self.points}
        return {"compression.target_ratio": self.ratio_to(fp32_bytes), "search": None}

    def ratio_to(self, fp32_bytes: Callable[[], int]) -> float:
        """Return how many times smaller than the fp32 network the file shall be at least.

        Args:
            fp32_bytes: of the network, which is built only for ``megabytes``.

        Raises:
            RecipeError: the file would not be smaller.
        """
        if self.megabytes is None:
            return self.ratio if self.ratio is not None else FP32_BITS / (self.bits or FP32_BITS)
        size = fp32_bytes()
        if 1e6 * self.megabytes >= size:
            raise RecipeError(
                f"--megabytes is {self.megabytes:g}, but the fp32 network has {size / 1e6:.3g}: give fewer."
            )
        return size / (1e6 * self.megabytes)


class WholeRecipe(RecipeSection):
    """What every recipe of a run says.

    Attributes:
        name: shown in tables and pictures.
        seed: of everything random.
        device: where the network is trained, compressed and judged: `cpu`, `cuda`, `cuda:1` or `mps`; `auto` takes
            a GPU that CUDA sees, else the CPU.
        loggers: where the run is told to while it goes on, beside the terminal: `csv`, `tensorboard`, `mlflow`,
            `wandb`, or one with options, `{name: wandb, mode: offline}` (docs/watching.md).
    """

    later_keys: ClassVar[frozenset[str]] = frozenset({"loggers"})

    name: str = ""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d{1,3})?)$")
    loggers: tuple[LoggerRecipe, ...] = ()

    @field_validator("loggers", mode="before")
    @classmethod
    def _one_logger_or_several(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str | Mapping) else given

    @field_validator("loggers")
    @classmethod
    def _each_logger_once(cls, given: tuple[LoggerRecipe, ...]) -> tuple[LoggerRecipe, ...]:
        if len({each.name for each in given}) < len(given):
            raise ValueError("each logger once")
        return given

    def as_yaml(self) -> str:
        """Return this recipe with every default filled in."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def with_seed(values: Any, section: str) -> Any:
    """Return a recipe's values in which a section has the recipe's seed, unless one is given there."""
    if not isinstance(values, Mapping):
        return values  # pydantic says that it is none
    inner = values.get(section) or {}
    if not isinstance(inner, Mapping):
        return values
    # Filled in before validation, so that it is written out and `as_yaml` says which seed it was.
    return {**values, section: {"seed": values.get("seed", 0), **inner}}


def with_bounds(values: Any) -> Any:
    """Return a recipe's values in which ``bounds: true`` is a section of defaults, and ``false`` is none."""
    if not isinstance(values, Mapping) or not isinstance(values.get("bounds"), bool):
        return values
    return {**values, "bounds": {} if values["bounds"] else None}


class RunRecipe(WholeRecipe):
    """A run of `sqs compress`.

    Attributes:
        seed: of everything random: initial weights, order of the data, compression.
        network: which network.
        data: on which data.
        baseline: where its fp32 weights come from. Its `seed` is the run's unless it is given.
        compression: how it is compressed.
        search: for the smallest file that loses at most so much, in place of a size that `compression` says.
        averaging: whether the posterior's average is evaluated too.
        bounds: how `bounds.json` and its picture are measured; `false` leaves them out.
    """

    network: NetworkRecipe
    data: DataRecipe
    baseline: RunBaselineRecipe = Field(default_factory=RunBaselineRecipe)
    compression: CompressionRecipe = Field(default_factory=CompressionRecipe)
    search: SearchRecipe | None = None
    averaging: AveragingRecipe | None = None
    bounds: BoundsRecipe | None = Field(default_factory=BoundsRecipe)

    @model_validator(mode="before")
    @classmethod
    def _baseline_follows_the_seed(cls, values: Any) -> Any:
        """Give each seed a baseline of its own, unless the recipe fixes one for all seeds."""
        return with_bounds(with_seed(values, "baseline"))

    @model_validator(mode="after")
    def _a_search_decides_the_size(self) -> "RunRecipe":
        check_searchable(self.search, self.compression)
        return self

    @property
    def baseline_key(self) -> str:
        """Sixteen hexadecimal digits that differ between baselines that could differ."""
        # Defaults included: if one changes in a later version, the baseline that is kept is another one.
        sections = self.model_dump(mode="json", include={"network", "data", "baseline"})
        return sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:16]


def load_recipe(path: str | Path, changes: Sequence[str] = ()) -> RunRecipe:
    """Read and validate a recipe.

    Args:
        path: YAML file.
        changes: ``"compression.nonzero_rate=0.2"``: values to put in place of the file's, in YAML notation.

    Raises:
        RecipeError: the file is missing or is no YAML, or a key or value in it is wrong.
    """
    return parse(RunRecipe, changed(read_yaml(Path(path)), changes))


def changed(values: Any, changes: Sequence[str]) -> Any:
    """Return ``values`` with dotted keys set, e.g. ``data.root=/data``; mappings on the way are made.

    A part that has dots itself is in double quotes: ``compression.layers."layer3.*".num_components=4``.

    Raises:
        RecipeError: a change is not KEY=VALUE with a value in YAML notation.
    """
    for change in changes:
        key, value = _key_and_value(change)
        values = with_value(values, key, value)
    return values


def _key_and_value(change: str) -> tuple[str, Any]:
    # The sign may stand in quotes, too: the key ends at the first outside of them.
    found = re.match(r'((?:"[^"]*"|[^="])+)=', change)
    if found is None or not all(key_parts(found[1])):
        raise RecipeError(f"Change {shown(change)} should be KEY=VALUE, as in compression.nonzero_rate=0.2.")
    return found[1], parse_yaml(change[found.end() :], f"Change {shown(change)} has a value that")


def with_value(values: Any, key: str, value: Any) -> dict[str, Any]:
    """Copy ``values`` with another value at a dotted key; what is no mapping on the way becomes one."""
    return _with_value(values, key_parts(key), value)


def _with_value(values: Any, parts: Sequence[str], value: Any) -> dict[str, Any]:
    first, *rest = parts
    inner = dict(values) if isinstance(values, Mapping) else {}
    return {**inner, first: _with_value(inner.get(first), rest, value) if rest else value}
