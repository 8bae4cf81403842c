"""Runs told to loggers: what they are told, also after an interruption, and what is refused first."""

import csv
import sys
from io import StringIO

import pytest
from kits.logger_packages import Tracking
from typer.testing import CliRunner

from sqs_pyro.cli import app
from sqs_pyro.errors import MissingPackageError, OutputError, RecipeError
from sqs_pyro.loggers import CSVFiles, logged
from sqs_pyro.recipes import parse
from sqs_pyro.reporting.printed import print_report
from sqs_pyro.reporting.tables import run_tables
from sqs_pyro.runs.images import run
from sqs_pyro.runs.recipe import RunRecipe


@pytest.fixture
def quick(small_recipe):
    """The small recipe with less behind training, and what is told of it."""

    def made(*loggers, **keys):
        values = small_recipe.model_dump() | {"averaging": None, "bounds": False, "loggers": loggers, **keys}
        return parse(RunRecipe, values)

    return made


def columns(path):
    rows = list(csv.DictReader(path.read_text().splitlines()))
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.slow
def test_a_run_is_told_step_by_step_and_goes_on(quick, tmp_path, monkeypatch, blank_pictures):
    tracking = Tracking()
    monkeypatch.setitem(sys.modules, "mlflow", tracking.module())
    recipe, out = quick("csv", {"name": "mlflow", "project": "digits", "uri": "sqlite:///here"}), tmp_path / "run"

    def interrupt(stage, done, total, text):
        if stage == "compression" and 2 * done >= total:
            (run,) = tracking.stores["sqlite:///here"].values()
            assert run.status == "RUNNING" and run.metrics[-1][2] == done
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, out, progress=interrupt)
    (told,) = tracking.stores["sqlite:///here"].values()
    assert (told.name, told.status, tracking.experiments) == ("small", "KILLED", ["digits"])
    metrics = run(recipe, out)
    # The same run; nothing twice, nothing left out, and of both stages what their histories say.
    assert tracking.stores["sqlite:///here"] == {"id0": told} and told.status == "FINISHED"
    history, logs = columns(out / "history.csv"), out / "logs" / "csv"
    assert columns(logs / "compression.csv")["step"] == history["step"]
    assert columns(logs / "compression.csv")["kl"] == history["kl"]
    assert [str(value) for key, value, _ in told.metrics if key == "compression/loss"] == history["loss"]
    assert columns(logs / "baseline.csv")["step"] == ["1", "2", "3"]
    assert dict(csv.reader((logs / "metrics.csv").read_text().splitlines()))["size.ratio"] == str(
        metrics["size"]["ratio"]
    )
    assert told.said["network.name"] == "digits_net" and "logs/mlflow/run_id" in (out / "SHA256SUMS").read_text()
    # Whoever is told of it, the file is the same.
    plain = run(quick(), tmp_path / "plain", baselines_dir=tmp_path / "baselines")
    names = [tmp_path / name / "packed.safetensors" for name in ("run", "plain")]
    assert names[0].read_bytes() == names[1].read_bytes() and plain["size"] == metrics["size"]


@pytest.mark.slow
def test_patience_is_told_by_what_it_kept(quick, tmp_path, blank_pictures):
    keys = {
        "baseline": {"epochs": 2, "patience": 1},
        "compression": {"epochs": 3, "num_components": 4, "freeze_start": 0.6, "patience": 1},
    }
    metrics = run(quick(**keys), tmp_path / "run")
    assert metrics["kept"]["baseline"]["planned"] == 2
    kept = metrics["kept"]["compression"]
    assert kept["best"] in (18, 27) and kept["planned"] == 27
    printed = StringIO()
    print_report(run_tables(metrics), printed, width=100)
    assert f"kept step {kept['best']}" in printed.getvalue()
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"kept step {kept['best']}" in page


def test_a_missing_package_is_told_before_anything(quick, tmp_path, monkeypatch):
    for name, package in (("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, package, None)
        if name == "tensorboard":  # which torch's own module imports
            monkeypatch.delitem(sys.modules, package)
            monkeypatch.setitem(sys.modules, "tensorboard", None)
        sentence = (
            rf"package '{name}', which is not installed: pip install 'sqs-pyro\[loggers\]', or pip install {name}"
        )
        with pytest.raises(MissingPackageError, match=sentence):
            run(quick(name), tmp_path / "run")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("loggers", "sentence"),
    [
        (["paper"], "'loggers.0.name' is 'paper', but should be 'csv', 'tensorboard', 'mlflow' or 'wandb'"),
        ([{"name": "csv", "mode": "offline"}], "without 'mode', which wandb has, beside name 'csv'"),
        (
            [{"name": "mlflow", "experiment": "x"}],
            "'loggers.0.experiment' is unknown: allowed here are mode, name",
        ),
        (["csv", "csv"], "but should be each logger once"),
        (3, "Recipe key 'loggers' is 3, but should be"),
    ],
)
def test_wrong_loggers_are_one_sentence(quick, loggers, sentence):
    with pytest.raises(RecipeError) as found:
        quick(loggers=loggers)
    assert sentence in str(found.value) and "\n" not in str(found.value)


def test_one_logger_needs_no_list_and_none_is_not_written(quick):
    assert quick(loggers="csv") == quick("csv") == quick({"name": "csv"})
    assert "loggers" not in quick().as_yaml() and "- name: csv" in quick("csv").as_yaml()


def test_the_command_line_names_them(quick, tmp_path, monkeypatch):
    path, asked = tmp_path / "recipe.yaml", []
    path.write_text(quick("csv").as_yaml())
    monkeypatch.setattr("sqs_pyro.runs.images.kind.run", lambda recipe, *_, **__: asked.append(recipe) or {})
    monkeypatch.setattr("sqs_pyro.reporting.tables.run_tables", lambda metrics: [])
    monkeypatch.setattr("sqs_pyro.cli.compressing.show", lambda *_: None)
    done = CliRunner().invoke(app, ["compress", str(path), "--logger", "mlflow", "--logger", "tensorboard"])
    assert done.exit_code == 0, done.output
    assert [each.name for each in asked[0].loggers] == ["mlflow", "tensorboard"]


class Broken(CSVFiles):
    """A logger whose disk is full from the second record on, or at the start."""

    at_start, records = False, 0

    def start(self, name, recipe):
        if self.at_start:
            raise OSError("no room")
        super().start(name, recipe)

    def record(self, stage, step, figures):
        self.records += 1
        if self.records > 1:
            raise OSError("no room")
        super().record(stage, step, figures)


def test_one_that_fails_is_left_behind_and_the_others_go_on(tmp_path):
    broken, good = Broken(tmp_path / "broken"), CSVFiles(tmp_path / "good")
    with logged([broken, good], "mine") as log:
        log.record("a", 1, {"loss": 0.5})
        with pytest.warns(
            RuntimeWarning, match=r"Logger Broken has failed \(OSError: no room\): training goes on"
        ):
            log.record("a", 2, {"loss": 0.25})
        log.record("a", 3, {"loss": 0.125})
        log.finish({"size": {"ratio": 2.5, "tensors": [1, 2]}, "name": "x", "met": True, "none": None})
    assert broken.records == 2
    assert (tmp_path / "good" / "a.csv").read_text() == "step,loss\n1,0.5\n2,0.25\n3,0.125\n"
    assert (tmp_path / "good" / "metrics.csv").read_text() == "name,value\nsize.ratio,2.5\n"


def test_one_that_cannot_start_is_refused_and_the_others_are_closed(tmp_path):
    class Closed(CSVFiles):
        outcome = None

        def close(self, outcome):
            self.outcome = outcome
            super().close(outcome)

    first, broken = Closed(tmp_path / "first"), Broken(tmp_path / "broken")
    broken.at_start = True
    with (
        pytest.raises(OutputError, match=r"Logger Broken cannot start \(OSError: no room\)"),
        logged([first, broken]),
    ):
        pass
    assert first.outcome == "failed"
    for error, outcome in ((KeyboardInterrupt, "interrupted"), (ValueError, "failed")):
        with pytest.raises(error), logged([first]):
            raise error
        assert first.outcome == outcome
