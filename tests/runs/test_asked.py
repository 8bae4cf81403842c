"""What somebody types becomes a whole recipe, or one sentence before any work."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from sqs_pyro.cli import app
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.errors import RecipeError, SQSError
from sqs_pyro.networks.registry import build_network
from sqs_pyro.networks.state import fp32_bytes
from sqs_pyro.runs.front.asked import asked_recipe, default_out
from sqs_pyro.runs.recipe import Goal

NETS = """
from torch import nn

def net(num_classes=2):
    return nn.Sequential(nn.Linear(4, 400), nn.ReLU(), nn.Linear(400, num_classes))
"""
MINE = """
import numpy as np

def made():
    held = np.load("a.npz")
    return {part: (held["x"], held["y"]) for part in ("train", "test")}
"""


def test_a_network_data_and_a_size_are_enough():
    recipe = asked_recipe("digits_net", "digits", Goal(ratio=20), changes=["compression.epochs=2"])
    assert (recipe.network.name, recipe.data.name, recipe.baseline.trained) == ("digits_net", "digits", False)
    section = recipe.compression
    assert (section.target_ratio, section.epochs) == (20, 2)
    assert section == CompressionRecipe(
        target_ratio=20, epochs=2, prior={"kind": "learned"}, allocation="rate_distortion", num_components=8
    )


def test_sizes_are_ratios():
    assert asked_recipe("digits_net", "digits", Goal(bits=1.6)).compression.target_ratio == pytest.approx(20)
    size = fp32_bytes(build_network("digits_net"))
    assert size == 4 * sum(
        t.numel() for t in build_network("digits_net").state_dict().values() if t.is_floating_point()
    )
    found = asked_recipe("digits_net", "digits", Goal(megabytes=0.02)).compression.target_ratio
    assert found == pytest.approx(size / 20_000)


def test_a_recipe_takes_a_size_too(tmp_path):
    values = {"network": {"name": "digits_net"}, "data": {"name": "digits"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    recipe = asked_recipe(str(tmp_path / "mine.yaml"), goal=Goal(ratio=9), changes=["seed=3"])
    assert (recipe.compression.target_ratio, recipe.seed) == (9, 3)
    assert asked_recipe(str(tmp_path / "mine.yaml")).compression.target_ratio is None


def test_directories_are_images_or_language_models(tmp_path):
    assert asked_recipe("resnet18", str(tmp_path), Goal(ratio=9)).data.name == "image_folder"
    (tmp_path / "config.json").write_text("{}")
    recipe = asked_recipe(str(tmp_path), goal=Goal(bits=3))
    assert (recipe.network.path, recipe.blockwise.bits, recipe.text.source) == (str(tmp_path), 3, "pydoc")
    texts = asked_recipe(str(tmp_path), "my.txt")
    assert (texts.text.source, texts.name) == ("my.txt", f"{tmp_path}, my.txt")
    assert asked_recipe(str(tmp_path), changes=["name=mine"]).name == "mine"
    small = asked_recipe(str(tmp_path), goal=Goal(megabytes=56)).blockwise
    assert (small.megabytes, small.bits) == (56, None)
    with pytest.raises(RecipeError, match=r"--ratio is for networks .* --bits, --megabytes or --points"):
        asked_recipe(str(tmp_path), goal=Goal(ratio=9))


def test_where_weights_come_from():
    assert asked_recipe("digits_net", "digits", Goal(ratio=9), trained=True).baseline.trained
    given = asked_recipe("digits_net", "digits", Goal(ratio=9), checkpoint=Path("w.pt")).baseline
    assert (given.checkpoint, given.trained) == (Path("w.pt"), False)


def typed(*arguments, goal=None, **options):
    return lambda: asked_recipe(*arguments, goal, **options)


DIGITS = ("digits_net", "digits")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Goal(ratio=2, bits=3), "--ratio and --bits are given, but one decides the size"),
        (lambda: Goal(ratio=0.5), "--ratio is 0.5, but a smaller file needs one above 1"),
        (lambda: Goal(bits=-1), "--bits is -1, but must be above zero"),
        (lambda: Goal(bits=32), "--bits is 32, but a smaller file needs fewer than 32"),
        (typed(*DIGITS), "not said how small .*: give --ratio, --megabytes, --bits or --points"),
        (typed("digits_net", None), "'digits_net' is no recipe .* needs data to be compressed on"),
        (typed(*DIGITS, goal=Goal(megabytes=9)), "--megabytes is 9, but the fp32 network has 0.379"),
        (typed("digits_net", "x", goal=Goal(ratio=2)), "'data.name' is 'x', but should be one of"),
        (
            typed("gone", "my.txt", goal=Goal(bits=3), changes=["text.count=8"]),
            "'my.txt' is text, .* but 'gone' is no",
        ),
        (typed("mine.yaml", "digits"), "'mine.yaml' is a recipe, .* but DATA is given"),
        (typed("mine.yaml", None, trained=True), "'mine.yaml' is a recipe, .* but --trained is given"),
        (typed(*DIGITS, goal=Goal(ratio=2), task="regression"), "digits has a class for each"),
        (
            typed(*DIGITS, goal=Goal(ratio=2), trained=True, checkpoint=Path("w")),
            "--trained and --checkpoint are given",
        ),
    ],
)
def test_what_is_refused(call, sentence):
    with pytest.raises(SQSError, match=sentence) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_language_models_have_bits(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for goal, options, sentence in (
        (Goal(ratio=3), {}, "--ratio is for networks that are fine-tuned, but this is a language model"),
        (Goal(bits=3), {"trained": True}, "is a language model, but --trained is for other networks"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            asked_recipe(str(tmp_path), goal=goal, **options)
    recipe = asked_recipe(str(tmp_path), goal=Goal(points=4), changes=["blockwise.num_components=3"])
    assert recipe.search.points == 4 and (recipe.blockwise.bits, recipe.blockwise.megabytes) == (1.75, None)
    assert recipe.name == str(tmp_path)


def test_a_size_is_said_once(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for source, data, goal, change, sentence in (
        (
            tmp_path,
            None,
            Goal(points=4),
            "blockwise.megabytes=5",
            "--points decides 'blockwise.megabytes', but --set",
        ),
        (tmp_path, None, Goal(bits=4), "search.points=5", "--bits decides 'search', but --set search.points says"),
        (
            "digits_net",
            "digits",
            Goal(ratio=4),
            "compression.target_ratio=5",
            "--ratio decides 'compression.target",
        ),
        ("digits_net", "digits", Goal(points=4), "search.points=5", "--points decides 'search.points', but --set"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            asked_recipe(str(source), data, goal, changes=[change])
    assert asked_recipe("digits_net", "digits", Goal(points=4), changes=["search.attempts=2"]).search.attempts == 2


def test_a_place_is_found_for_a_run():
    assert default_out("torchvision/vgg11", "a/b.csv", Goal(ratio=20)) == Path(
        "runs/torchvision-vgg11-a-b.csv-ratio20"
    )
    assert default_out("recipes/digits.yaml", None, Goal()) == Path("runs/digits")
    assert default_out("nets.py:build", "x.npz", Goal(megabytes=0.5)).parent == Path("runs")


@pytest.mark.usefixtures("blank_pictures")
def test_the_command_ends_in_a_file_and_its_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    Path("mine.py").write_text(MINE)
    x = np.random.default_rng(0).normal(size=(200, 4)).astype("float32")
    np.savez("a.npz", x=x, y=(x.sum(1) > 0).astype(int) * 2)

    def sqs(*arguments):
        return CliRunner().invoke(app, [str(each) for each in arguments])

    quick = ["--set", "compression.epochs=2", "--set", "baseline.epochs=3", "--set", "bounds=false"]
    for data in ("a.npz", "mine.py:made"):
        result = sqs("compress", "nets.py:net", data, "--ratio", 4, *quick)
        assert result.exit_code == 0, result.output
        out = default_out("nets.py:net", data, Goal(ratio=4))
        again = asked_recipe(str(out / "recipe.yaml"))
        assert (again.network.name, again.data.name, again.compression.target_ratio) == ("nets.py:net", data, 4)
        options = ["--network", "nets.py:net", *(["--data", data] if ":" in data else [])]
        assert sqs("evaluate", out, *options).exit_code == 0
        assert sqs("inspect", out, "--runtime", *options[:2]).exit_code == 0
        assert sqs("export", out, "--format", "dense", "--out", out.name + ".safetensors", *options).exit_code == 0
        bench = sqs(
            "bench", "model", out, *options[:2], "--input-shape", "4", "--rounds", 2, "--batch", 1, "--eager"
        )
        assert bench.exit_code == 0, bench.output
    # The smallest file that is good enough: nothing is, and the best is kept all the same.
    few = [
        "--set",
        "search.attempts=1",
        "--set",
        "compression.epochs=1",
        "--set",
        "compression.learning_rate=1e-6",
    ]
    searched = sqs("compress", "nets.py:net", "a.npz", "--points", 7, "--out", "searched", *quick, *few)
    assert searched.exit_code in (0, 2) and "at most 7 points" in searched.stdout
    unmet = json.loads(Path("searched/metrics.json").read_text())["search"]["unmet"]
    assert (searched.exit_code == 2) == (unmet is not None) and (unmet or "Wrote searched") in searched.stderr
    # Of the last file the data are code, too.
    refused = sqs("evaluate", out, "--network", "nets.py:net")
    assert refused.exit_code == 2 and "judged by code of its user, 'mine.py:made': give --data" in refused.stderr
