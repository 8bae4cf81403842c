"""Data sets as loaders of minibatches: digits, Fashion-MNIST, CIFAR, a folder of images, your own arrays."""

from sqs_pyro.data.array_loader import ArrayLoader, Augmentation
from sqs_pyro.data.load import Data, Loader, load_data
from sqs_pyro.data.recipe import DataRecipe
from sqs_pyro.data.shifts import ShiftedLoader, parse_shift

__all__ = [
    "ArrayLoader",
    "Augmentation",
    "Data",
    "DataRecipe",
    "Loader",
    "ShiftedLoader",
    "load_data",
    "parse_shift",
]
