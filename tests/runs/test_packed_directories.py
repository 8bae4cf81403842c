"""Packed Hugging Face directories where a command takes a packed file: the same figures, or one sentence."""

import json

import pytest
import torch
from kits.image_directory import write_directory, write_photos
from kits.language_checkpoint import tokenizer
from kits.pictures import unpainted
from typer.testing import CliRunner

import sqs_pyro
from sqs_pyro.cli import app
from sqs_pyro.errors import NetworkError, PackedFileError
from sqs_pyro.integrations import checkpoint_size, save_pretrained
from sqs_pyro.networks.calling import predictions
from sqs_pyro.networks.task_networks import transformer_in
from sqs_pyro.runs.files import evaluate_file, file_network, inspect_file, opened
from sqs_pyro.runs.front.asked import asked_recipe
from sqs_pyro.runs.images import run
from sqs_pyro.runs.recipe import Goal

CHANGES = ["compression.epochs=2", "bounds=false", "data.batch_size=8", "data.num_workers=0", "data.augment=false"]


def sqs(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A run on images, and its network as a packed directory."""
    root = tmp_path_factory.mktemp("images")
    directory, photos = write_directory(root / "net"), write_photos(root / "photos")
    with unpainted():
        run(asked_recipe(str(directory), str(photos), Goal(ratio=3), changes=CHANGES), root / "run")
    save_pretrained(sqs_pyro.load(root / "run/packed.safetensors"), root / "packed")
    return root


def test_figures_are_those_of_the_file(images):
    of_file, found = (evaluate_file(images / name) for name in ("run", "packed"))
    figures = ("accuracy", "nll", "ece", "brier", "num_examples", "data")
    assert {key: found[key] for key in figures} == {key: of_file[key] for key in figures}
    assert found["size"]["file_bytes"] == checkpoint_size(images / "packed").total
    # transformers sorts what it writes into config.json.
    assert found["size"]["tensors"] == sorted(of_file["size"]["tensors"], key=lambda row: row["name"])


def test_its_bytes_are_those_on_the_disk(images):
    inspection = inspect_file(images / "packed", runtime=True)
    counted = ("model.safetensors", "config.json")
    size = inspection["size"]
    assert size["file_bytes"] == sum((images / "packed" / name).stat().st_size for name in counted)
    assert sum(size["parts"].values()) == size["file_bytes"]
    of_file = inspect_file(images / "run")
    for key in ("num_weights", "nonzeros", "fp32_bytes", "paper_ratio", "largest_uncompressed", "bits_per_weight"):
        assert size[key] == of_file["size"][key]
    assert inspection["metadata"]["recipe"] == of_file["metadata"]["recipe"]
    assert len(inspection["runtime"]["weights"]) == len(size["tensors"])


@pytest.mark.usefixtures("blank_pictures")
def test_every_command_takes_it(images, tmp_path):
    packed = images / "packed"
    for arguments in (
        ["inspect", packed],
        ["uncertainty", packed],
        ["bench", "model", packed, "--rounds", 1, "--batch", 1, "--eager"],
        ["export", packed, "--format", "dense", "--out", tmp_path / "dense"],
    ):
        result = sqs(*arguments)
        assert result.exit_code == 0, result.output


@torch.no_grad()
def test_a_plain_directory_is_written_of_it_and_read_again(images, tmp_path):
    document = json.loads(
        sqs("export", images / "packed", "--format", "dense", "--out", tmp_path / "d", "--json").stdout
    )
    assert document["max_difference"] < 1e-5 and document["example"] == "first test examples"
    from sqs_pyro.integrations.image_directory import image_network

    net, x = image_network(str(tmp_path / "d"), complete=True), torch.randn(2, 3, 16, 16)
    expected = predictions(file_network(images / "packed"), x)
    torch.testing.assert_close(predictions(net, x), expected, rtol=1e-4, atol=1e-5)


def test_a_language_model_s_is_its_own_checkpoint(tiny_language_run, tmp_path):
    packed = file_network(tiny_language_run)
    save_pretrained(packed, tmp_path / "bare")
    save_pretrained(packed, tmp_path / "whole", tokenizer())
    metrics = json.loads((tiny_language_run / "metrics.json").read_text())["compressed"]
    for name in ("whole", "bare"):  # without a tokenizer that of the checkpoint that was compressed is read
        found = evaluate_file(tmp_path / name)
        for text, own in metrics.items():
            assert found["perplexity"][text]["perplexity"] == pytest.approx(own["perplexity"], rel=1e-5)
    assert found["network"]["path"] != str(tmp_path / "bare")
    assert evaluate_file(tmp_path / "whole")["network"]["path"] == str(tmp_path / "whole")


def test_a_language_model_without_a_recipe_is_judged_as_one(tmp_path):
    from kits.tiny_transformers import code_matrices, tiny

    from sqs_pyro.kernels import packed_network

    net = tiny("llama")
    save_pretrained(packed_network(net, code_matrices(net)), tmp_path)
    assert opened(tmp_path).document == {"blockwise": {}, "network": {"path": str(tmp_path), "gguf_file": None}}
    with pytest.raises(NetworkError, match=f"The tokenizer of '{tmp_path}' cannot be loaded"):
        evaluate_file(tmp_path)
    result = sqs("bench", "model", tmp_path, "--rounds", 1, "--batch", 1, "--eager", "--lengths", 4)
    assert result.exit_code == 0, result.output


def test_a_task_s_is_judged_by_the_task(tiny_task_run, tmp_path):
    save_pretrained(transformer_in(file_network(tiny_task_run)), tmp_path)
    of_file, found = evaluate_file(tiny_task_run), evaluate_file(tmp_path)
    assert {key: found[key] for key in ("accuracy", "nll")} == {key: of_file[key] for key in ("accuracy", "nll")}


@pytest.mark.parametrize("command", ["evaluate", "inspect", "uncertainty", "bench model", "export", "report"])
def test_what_is_not_packed_is_told_in_one_sentence(command, images, tmp_path):
    options = ["--format", "dense", "--out", tmp_path / "out"] if command == "export" else []
    result = sqs(*command.split(), images / "net", *options)
    said = "keeps no figures of a run" if command == "report" else "not packed: compress them with `sqs compress`"
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1


def test_what_does_not_go_with_a_directory(images):
    with pytest.raises(PackedFileError, match=r"is a Hugging Face directory, .*: leave --network out"):
        evaluate_file(images / "packed", network="resnet18")
    with pytest.raises(NetworkError, match="are packed already: give a network in floating point"):
        run(
            asked_recipe(str(images / "packed"), str(images / "photos"), Goal(ratio=3), changes=CHANGES),
            images / "again",
        )


def test_a_file_loads_where_nothing_else_is_imported(images):
    from kits import forks

    script = "import sqs_pyro, sys; print(type(sqs_pyro.load(sys.argv[1])).__name__)"
    done = forks.run(script, images / "run/packed.safetensors")
    assert done.stdout.split() == ["ViTForImageClassification"], done.stderr
