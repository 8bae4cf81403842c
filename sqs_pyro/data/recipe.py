"""The `data` section of a recipe."""

import difflib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from sqs_pyro.own_code import is_own
from sqs_pyro.recipes import RecipeSection

#: What is known by its name alone, or by name and `root`.
IMAGE_SETS = ("digits", "fashion_mnist", "cifar10", "cifar100")
#: Files whose arrays or columns are inputs and targets.
FILE_TYPES = (".npz", ".csv", ".jsonl", ".json", ".parquet")
#: What is put before the name of a data set of the Hugging Face hub.
HUB = "hub/"
_HUB_OPTIONS = frozenset({"name", "revision"})

Task = Literal["classification", "multilabel", "regression", "segmentation"]


class DataRecipe(RecipeSection):
    """Which data set, from where, and how it is cut into minibatches.

    Attributes:
        name: the data set: `digits`, `fashion_mnist`, `cifar10`, `cifar100` or `image_folder`; a file, `.npz`,
            `.csv`, `.jsonl` or `.parquet`; one of the Hugging Face hub, `hub/NAME`, or the directory of a copy
            that `save_to_disk` made; or a function of yours that returns data, `module:function` or
            `path/file.py:function`.
        task: what is learned: a class of each example, several labels at once, numbers, or a class of each pixel
            or token. All but the first are of files, tables and functions.
        root: its directory; None looks in the places that ``docs/data.md`` lists. `digits` needs none.
        batch_size: examples in a training minibatch.
        validation: training examples held out for every choice (rates, epochs, thresholds); None holds out
            a tenth, but at most 5,000. An image folder with a `val/` beside a `test/` uses that instead.
        inputs: of a file or a data set of the hub: the array, or the columns, that the network takes. None: of an
            `.npz` `x_train` and `x_test`, or `x`; of a table its images, or all columns but the targets, in their
            order.
        targets: likewise: the array or columns to learn. None: of an `.npz` `y_train` and `y_test`, or `y`; of a
            table its labels, or its last column.
        test: of a file: another one of its kind with the test examples; of a data set of the hub: the split that
            has them. None: the split `test` or `validation`, or a fifth of the examples.
        standardise: of a file: inputs, and numbers to learn, are brought to mean 0 and standard deviation 1, by
            channel or column, as the training examples have them; the packed file keeps these numbers.
        ignore_index: a label of pixels or tokens that counts for nothing.
        metric: by which networks are chosen and compared, beside the task's own figures: a class of torchmetrics,
            `F1Score`, or a function of yours, `module:function`, of what the network says and the labels.
        metric_options: keyword arguments of the metric, e.g. `{average: macro}`; what it has to know of the data,
            such as `num_classes`, it gets.
        options: keyword arguments of a function; of a data set of the hub `name`, of its configuration, and
            `revision`.
        channels: images of one channel get so many, all the same, for networks that take three; None: as they are.
        augment: random crops and flips (digits: shifts by a pixel) of the training images; not of files.
        image_size: side in pixels of the images of an image folder or the hub, as the network sees them.
        mean: of such images' pixels between 0 and 1, a number for each of three channels or for all: it is
            subtracted. None: ImageNet's.
        std: by which they are divided then, likewise.
        num_workers: processes that decode such images, or load a function's data set.
        download: fetch the data set when it is not there.
        limit: so many training examples and as many of the test examples, to try a recipe with: of digits,
            Fashion-MNIST and CIFAR the first, of an image folder from all classes alike.
    """

    later_keys: ClassVar[frozenset[str]] = frozenset({"limit"})

    name: str = Field(min_length=1)
    task: Task = "classification"
    root: Path | None = None
    batch_size: int = Field(default=128, ge=1)
    validation: int | None = Field(default=None, ge=1)
    inputs: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(default=None, min_length=1)
    targets: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(default=None, min_length=1)
    test: Path | None = None
    standardise: bool = True
    ignore_index: int = -100
    metric: str | None = Field(default=None, min_length=1)
    metric_options: dict[str, Any] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)
    channels: int | None = Field(default=None, ge=1, le=4)
    augment: bool = True
    image_size: int = Field(default=224, ge=1, le=4096)
    mean: tuple[float, ...] | None = None
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    num_workers: int = Field(default=2, ge=0, le=256)
    download: bool = False
    limit: int | None = Field(default=None, ge=20)

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name in (*IMAGE_SETS, "image_folder") or is_own(name) or is_file_name(name) or _is_table(name):
            return name
        known = (*IMAGE_SETS, "image_folder")
        close = difflib.get_close_matches(name[:80], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"one of {', '.join(known)}, a file ({', '.join(FILE_TYPES)}), hub/NAME, the directory of a data set "
            f"that save_to_disk made, or a function, module:function{hint}"
        )

    @field_validator("mean", "std")
    @classmethod
    def _is_of_channels(cls, numbers: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if numbers is not None and len(numbers) not in (1, 3):
            raise ValueError("one number, or three: of red, green and blue")
        return numbers

    @model_validator(mode="after")
    def _fits_its_source(self) -> "DataRecipe":
        if self.task != "classification" and self.is_images:
            raise ValueError(f"a section without task {self.task}: {self.name} has a class for each image")
        for key in ("inputs", "targets", "test"):
            if getattr(self, key) is not None and not (self.is_file or self.is_table):
                raise ValueError(
                    f"a section without {key}, which is of files ({', '.join(FILE_TYPES)}) and hub/NAME"
                )
        for key in ("mean", "std"):
            if getattr(self, key) is not None and self.name != "image_folder" and not self.is_table:
                raise ValueError(f"a section without {key}, which is of image folders and hub/NAME")
        if self.limit is not None and self.name not in (*IMAGE_SETS, "image_folder"):
            raise ValueError(f"a section without limit, which is of {', '.join(IMAGE_SETS)} and image_folder")
        if self.metric_options and self.metric is None:
            raise ValueError("a section with a metric beside metric_options")
        if self.name.startswith(HUB):
            if self.root is not None:
                raise ValueError(f"a section without root: {self.name} is found by its name")
            if others := sorted(self.options.keys() - _HUB_OPTIONS):
                raise ValueError(f"a section whose options are name and revision alone, without {others[0]!r}")
        elif self.options and not is_own(self.name):
            raise ValueError("a section without options, which are of functions (module:function) and hub/NAME")
        return self

    @property
    def is_images(self) -> bool:
        """Whether it is one of the sets of images that are known by name."""
        return self.name in (*IMAGE_SETS, "image_folder")

    @property
    def is_file(self) -> bool:
        """Whether it is a file of arrays or columns."""
        return not self.is_images and not is_own(self.name) and is_file_name(self.name)

    @property
    def is_table(self) -> bool:
        """Whether it is a data set of the Hugging Face hub, or a copy of one."""
        return not (self.is_images or is_own(self.name) or is_file_name(self.name))


def is_file_name(name: str) -> bool:
    """Whether a name is that of a file of arrays or columns."""
    return Path(name).suffix.lower() in FILE_TYPES


def _is_table(name: str) -> bool:
    # By its form, too: a packed file names its data where they may not be.
    return name.startswith(HUB) or "/" in name or Path(name).is_dir()
