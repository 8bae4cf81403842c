"""Images as loaders of minibatches, text as sequences of tokens: by name, from files, or your own."""

from sqs_pyro.data.array_loader import ArrayLoader, Augmentation
from sqs_pyro.data.generation import generate_calibration
from sqs_pyro.data.load import load_data
from sqs_pyro.data.recipe import DataRecipe
from sqs_pyro.data.shifts import ShiftedLoader, parse_shift
from sqs_pyro.data.splits import Data, Loader
from sqs_pyro.data.text import Text, TextRecipe, load_text
from sqs_pyro.data.tokens import token_sequences, token_stream

__all__ = [
    "ArrayLoader",
    "Augmentation",
    "Data",
    "DataRecipe",
    "Loader",
    "ShiftedLoader",
    "Text",
    "TextRecipe",
    "generate_calibration",
    "load_data",
    "load_text",
    "parse_shift",
    "token_sequences",
    "token_stream",
]
