"""From a network, data and a size, as somebody types them, to a whole recipe."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqs_pyro.data.hub import is_saved
from sqs_pyro.data.recipe import HUB
from sqs_pyro.documents import read_yaml
from sqs_pyro.errors import RecipeError
from sqs_pyro.integrations.image_directory import CONFIG, is_of_images, preprocessing, weight_files
from sqs_pyro.integrations.pretrained_recipe import is_gguf
from sqs_pyro.own_code import is_own
from sqs_pyro.runs.kinds import kind_of, parse_any_recipe
from sqs_pyro.runs.recipe import Goal, changed, with_value

_YAML = (".yaml", ".yml")
TEXT = ".txt"  # which no other network can read
IMAGE_FOLDER = "image_folder"

#: How a network is compressed to a size where nobody says how: the learned prior spends the bits.
LEARNED = {"prior": {"kind": "learned"}, "allocation": "rate_distortion", "num_components": 8, "layout": "auto"}


def asked_recipe(
    source: str,
    data: str | None = None,
    goal: Goal | None = None,
    *,
    task: str | None = None,
    checkpoint: Path | None = None,
    trained: bool = False,
    changes: Sequence[str] = (),
) -> Any:
    """Return the recipe that a command line means.

    Args:
        source: a recipe's file; a network, see :func:`~sqs_pyro.networks.registry.build_network`; or the Hugging
            Face directory of a classifier of images or a language model, or a language model's GGUF file.
        data: a data set's name, a file, a function or a directory of images; none beside a recipe. Of a language
            model, a file of text.
        goal: how small the file shall be.
        task: what is learned, see :class:`~sqs_pyro.data.recipe.DataRecipe`.
        checkpoint: of the network's weights; without one it is trained first.
        trained: whether the network has its weights from what builds it.
        changes: ``"compression.epochs=2"``: what else shall be as it is said.

    Raises:
        RecipeError, DataError, NetworkError: one sentence.
    """
    goal = goal or Goal()
    extra = {"DATA": data, "--task": task, "--checkpoint": checkpoint, "--trained": trained or None}
    if Path(source).suffix.lower() in _YAML:
        given = [name for name, value in extra.items() if value is not None]
        if given:
            raise RecipeError(
                f"'{source}' is a recipe, which says it itself, but {given[0]} is given: change keys with --set."
            )
        return _sized(changed(read_yaml(Path(source)), changes), goal, changes)
    directory = (Path(source) / CONFIG).is_file()
    if is_gguf(source) or (directory and not is_of_images(source)):
        if given := [name for name, value in extra.items() if value is not None and name != "DATA"]:
            raise RecipeError(
                f"'{source}' is a language model, but {given[0]} is for other networks: leave it out."
            )
        values: dict[str, Any] = {"network": {"path": source}, "blockwise": {}}
        values["name"] = source if data is None else f"{source}, {data}"
        if data is not None:
            values["text"] = {"source": data}
        return _sized(changed(values, changes), goal, changes)
    if data is None:
        raise RecipeError(
            f"'{source}' is no recipe (.yaml) and no language model (a directory with config.json, or *.gguf), "
            "and another network needs data to be compressed on: give DATA, a data set's name, a file, a "
            "directory of images or module:function."
        )
    if not is_own(data) and Path(data).suffix.lower() == TEXT:
        raise RecipeError(
            f"'{data}' is text, which language models are compressed on, but '{source}' is none (a directory with "
            "config.json, or *.gguf): correct its path, or give data for this network."
        )
    if not goal:
        raise RecipeError(
            "It is not said how small the file shall be: give --ratio, --megabytes, --bits or --points."
        )
    values = changed(_of_network(source, data, task, checkpoint, trained), changes)
    return _sized(_of_directory(source, values) if directory else values, goal, changes)


def default_out(source: str, data: str | None, goal: Goal) -> Path:
    """Return where a run goes that nobody gave a place: ``runs/`` and what it is of."""
    size = next((f"{name}{value:g}" for name, value in vars(goal).items() if value is not None), "")
    parts = [Path(source).stem if Path(source).suffix.lower() in _YAML else source, data or "", size]
    slug = "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-.") for part in parts if part)
    return Path("runs") / slug


def _of_network(
    network: str, data: str, task: str | None, checkpoint: Path | None, trained: bool
) -> dict[str, Any]:
    if trained and checkpoint is not None:
        raise RecipeError("--trained and --checkpoint are given, but one says where the weights come from.")
    directory = not is_own(data) and Path(data).is_dir() and not is_saved(data)
    section: dict[str, Any] = {"name": IMAGE_FOLDER, "root": data} if directory else {"name": data}
    if task is not None:
        section["task"] = task
    baseline = {"trained": True} if trained else {"checkpoint": str(checkpoint)} if checkpoint is not None else {}
    return {
        "name": f"{network}, {data}",
        "network": {"name": network},
        "data": section,
        "baseline": baseline,
        "compression": dict(LEARNED),
    }


def _of_directory(directory: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe of a network in a Hugging Face directory: images as it wants them, its weights kept.

    What was said counts: who wants a new head, or says anything of training, gets the network trained.
    """
    network, data = values["network"], values["data"]
    if not isinstance(network, Mapping) or not isinstance(data, Mapping):  # by --set: which is told elsewhere
        return values
    new_head = "num_classes" in (network.get("options") or ())
    if not values["baseline"] and weight_files(directory) and not new_head:
        values = {**values, "baseline": {"trained": True}}
    name = str(data.get("name"))
    if name == IMAGE_FOLDER or name.startswith(HUB) or is_saved(name):
        values = {**values, "data": {**preprocessing(directory), **data}}
    return values


def _sized(values: Any, goal: Goal, changes: Sequence[str]) -> Any:
    """Return the recipe of values, in which ``changes`` are made, and of a size that none of them has said."""
    if not goal or not isinstance(values, Mapping):
        return parse_any_recipe(values)
    # Without a search, which may be whole only with the goal.
    recipe = parse_any_recipe({key: value for key, value in values.items() if key != "search"})
    for key, value in kind_of(recipe).sized(recipe, goal).items():
        for other in (change.partition("=")[0] for change in changes):
            if other == key or other.startswith(f"{key}."):
                given = next(name for name, size in vars(goal).items() if size is not None)
                raise RecipeError(
                    f"--{given} decides '{key}', but --set {other} says it, too: leave out one of them."
                )
        values = with_value(values, key, value)
    return parse_any_recipe(values)
