"""The `data` section of a recipe."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from sqs_pyro.recipes import RecipeSection


class DataRecipe(RecipeSection):
    """Which data set, from where, and how it is cut into minibatches.

    Attributes:
        name: the data set.
        root: its directory; None looks in the places that ``docs/data.md`` lists. `digits` needs none.
        batch_size: examples in a training minibatch.
        validation: training examples held out for every choice (rates, epochs, thresholds); None holds out
            a tenth, but at most 5,000. An image folder with a `val/` beside a `test/` uses that instead.
        augment: random crops and flips (digits: shifts by a pixel) of the training images.
        image_size: side in pixels of an image folder's images, as the network sees them.
        num_workers: processes that decode an image folder's files.
        download: fetch the data set when it is not there.
    """

    name: Literal["digits", "fashion_mnist", "cifar10", "cifar100", "image_folder"]
    root: Path | None = None
    batch_size: int = Field(default=128, ge=1)
    validation: int | None = Field(default=None, ge=1)
    augment: bool = True
    image_size: int = Field(default=224, ge=1, le=4096)
    num_workers: int = Field(default=2, ge=0, le=256)
    download: bool = False
