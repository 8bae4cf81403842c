"""Networks of images out of a Hugging Face directory: what its config.json says, with weights if there are any."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sqs_pyro.documents import read_json_object, shown
from sqs_pyro.errors import NetworkError, RecipeError, SQSError, first_line
from sqs_pyro.integrations.pretrained import is_of_head, quiet, transformers_package
from sqs_pyro.kernels.described import at_most_parts
from sqs_pyro.networks.state import check_finite
from sqs_pyro.networks.task_networks import AUTO_CLASSES, foreign_key, task_network

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_TASK = "image_classification"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_MOST_CLASSES = 1_000_000
_MOST_PARTS = 20_000  # modules and parameters: ten times those of the largest vision transformers


def is_directory(name: str) -> bool:
    """Whether a network's name is a Hugging Face directory's: one with config.json, or a path to any directory."""
    path = Path(name)
    return (path / CONFIG).is_file() or ("/" in name and path.is_dir())


def is_of_images(directory: str | Path) -> bool:
    """Whether a directory's config.json is that of a network that transformers knows as a classifier of images."""
    kind = _config(Path(directory)).get("model_type")
    return isinstance(kind, str) and kind in _known()


def weight_files(directory: str | Path) -> list[Path]:
    """Return the files of a directory's weights, sorted; none: config.json alone is there."""
    return sorted(file for pattern in _WEIGHTS for file in Path(directory).glob(pattern) if file.is_file())


def weights_digest(directory: str | Path) -> str:
    """Return sixteen hexadecimal digits that differ between directories of other networks or weights."""
    digest = sha256()
    for path in [Path(directory) / CONFIG, *weight_files(directory)]:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def image_network(
    directory: str, options: Mapping[str, Any] | None = None, *, complete: bool = False
) -> nn.Module:
    """Return the classifier of images in a directory, float32, which packed files rebuild from its configuration.

    Args:
        directory: with ``config.json`` and, if it likes, weights. Nothing is fetched, and no code in it is run.
        options: ``num_classes`` in place of the configuration's: the network then gets a new head.
        complete: whether every weight has to be the directory's; otherwise a new head, and a network without
            weights, are drawn at random.

    Raises:
        RecipeError: there is another option.
        NetworkError: the directory has no such network, or weights are missing, damaged, packed or quantized.
        MissingPackageError: transformers is not installed.
    """
    num_classes = _num_classes(directory, options or {})
    _check(Path(directory))
    known = {} if num_classes is None else {"num_labels": num_classes}
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    transformers = transformers_package()
    auto_class = getattr(transformers, AUTO_CLASSES[_TASK])
    found: Mapping[str, Any] = {}
    with _one_sentence(directory), quiet(transformers, Path(directory)), at_most_parts(_MOST_PARTS, NetworkError):
        if weight_files(directory):
            net, found = auto_class.from_pretrained(
                directory,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are looked at below, where transformers only logs them
                **where,
                **known,
            )
        else:
            config = transformers.AutoConfig.from_pretrained(directory, **where, **known)
            net = auto_class.from_config(config, trust_remote_code=False).float()
    _check_weights(directory, net, found, complete=complete, new_head=num_classes is not None)
    return task_network(net, _TASK)


def check_class_order(directory: str, net: nn.Module, names: Sequence[str]) -> None:
    """Check that a network that stays as it is numbers its classes as the data does, where both name them.

    Raises:
        NetworkError: it has the same names in another order.
    """
    owner: Any = net
    of_network = {name: int(number) for number, name in owner.config.id2label.items()}
    other = next((i for i, name in enumerate(names) if of_network.get(name, i) != i), None)
    if other is not None and of_network.keys() == set(names):
        raise NetworkError(
            f"Class {names[other]!r} is number {other} in the data, but {of_network[names[other]]} in "
            f"'{directory}': order the data's classes as the network does, or train it first, without `trained`."
        )


def preprocessing(directory: str | Path) -> dict[str, Any]:
    """Return how a directory's network wants its images, as keys of a recipe's ``data``; what it says of it.

    Raises:
        NetworkError: the preprocessor's document is damaged.
    """
    path = Path(directory) / PREPROCESSOR
    said = read_json_object(path, NetworkError, "fetch it again") if path.is_file() else {}
    side = _side(said.get("crop_size")) if said.get("do_center_crop") else None
    side = side or _side(said.get("size")) or _side(_config(Path(directory)).get("image_size"))
    found: dict[str, Any] = {} if side is None else {"image_size": side}
    if said.get("do_normalize", True):
        return found | {
            key: said[name] for key, name in (("mean", "image_mean"), ("std", "image_std")) if name in said
        }
    return found | {"mean": [0.0], "std": [1.0]}


def _side(size: Any) -> int | None:
    """Return the side of square images, as any of transformers' preprocessors writes it."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge", size.get("height"))
    if isinstance(size, list):
        size = size[0] if size else None
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None


def _known() -> Mapping[str, Any]:
    """Return what transformers' classifiers of images are, by the ``model_type`` in their configuration."""
    transformers_package()
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES  # heavy

    known: Mapping[str, Any] = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    return known


def _config(directory: Path) -> dict[str, Any]:
    return read_json_object(directory / CONFIG, NetworkError, "fetch it again")


def _num_classes(directory: str, options: Mapping[str, Any]) -> int | None:
    if others := sorted(options.keys() - {"num_classes"}):
        raise RecipeError(
            f"Network '{directory}' has no option {shown(others[0], 80)}: its config.json says what it is, and "
            "num_classes alone can be given, for a new head."
        )
    number = options.get("num_classes")
    if number is None or (
        isinstance(number, int) and not isinstance(number, bool) and 0 < number <= _MOST_CLASSES
    ):
        return number
    raise RecipeError(
        f"Option num_classes of network '{directory}' is {shown(number)}, but should be a number from 1 to "
        f"{_MOST_CLASSES}."
    )


def _check(directory: Path) -> None:
    """Check that a directory says that it is of a classifier of images, with weights in floating point."""
    if not (directory / CONFIG).is_file():
        raise NetworkError(
            f"'{directory}' has no {CONFIG}: give the Hugging Face directory of a classifier of images."
        )
    config = _config(directory)
    kind = config.get("model_type")
    if isinstance(packed := config.get("quantization_config"), Mapping):
        how = "packed already" if packed.get("quant_method") == "sqs" else "quantized already"
        raise NetworkError(f"The weights in '{directory}' are {how}: give a network in floating point.")
    if not isinstance(kind, str) or kind not in _known():
        raise NetworkError(
            f"'{directory}' holds a network of model_type {shown(kind, 80)}, which is no classifier of images of "
            "transformers: `sqs compress DIRECTORY` takes language models, recipes with `task` those of texts."
        )
    if foreign := foreign_key(config):
        raise NetworkError(
            f"'{directory}/{CONFIG}' says {foreign!r}: that network is another library's, name it as timm/NAME."
        )


def _check_weights(
    directory: str, net: nn.Module, found: Mapping[str, Any], *, complete: bool, new_head: bool
) -> None:
    """Check that a directory's weights are the network's, of the head unless a new one was asked for."""
    if not found and complete:
        raise NetworkError(f"'{directory}' has no weights ({', '.join(_WEIGHTS)}): add them, or train it first.")
    # transformers draws such weights at random and only logs it.
    wrong = [*found.get("missing_keys", ()), *(str(each[0]) for each in found.get("mismatched_keys", ()))]
    others = [name for name in wrong if not is_of_head(net, name)]
    if others or (wrong and not new_head):
        repair = (
            "give a complete one"
            if others
            else "say how many classes there are (network.options.num_classes), and it gets a new head"
        )
        raise NetworkError(
            f"'{directory}' lacks {len(wrong)} weights of a {type(net).__name__}, or has them in another shape, "
            f"{sorted(others or wrong)[0]!r} first: {repair}."
        )
    if wrong and complete:
        raise NetworkError(
            f"The head of '{directory}' is new, {sorted(wrong)[0]!r} say: train it first, without `trained`."
        )
    check_finite(net.state_dict(), net, directory)


@contextmanager
def _one_sentence(directory: str) -> Iterator[None]:
    try:
        yield
    except SQSError:
        raise
    except Exception as error:  # each of transformers, safetensors and torch has classes of its own
        raise NetworkError(
            f"The network in '{directory}' cannot be loaded ({first_line(error)}): complete the directory, or "
            "correct its config.json."
        ) from error
