"""Every logger keeps the contract: files and installed packages for real, and stand-ins for all packages."""

import csv
import sys
from itertools import count
from types import SimpleNamespace

import pytest
from kits.logger_packages import Cloud, Events, Tracking

from sqs_pyro.loggers import CSVFiles, MLflow, TensorBoard, WandB
from sqs_pyro.testing import LoggerContract


def by_step(points):
    """Points ``(step, name, value)`` as figures by step, the last of each."""
    found = {}
    for step, name, value in points:
        found.setdefault(step, {})[name] = value
    return found


class TestCSVFiles(LoggerContract):
    def make(self, directory):
        return CSVFiles(directory)

    def told(self, directory, stage):
        path = directory / f"{stage}.csv"
        rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
        return {int(row.pop("step")): {name: float(cell) for name, cell in row.items() if cell} for row in rows}

    def metrics(self, directory):
        rows = csv.DictReader((directory / "metrics.csv").read_text().splitlines())
        return {row["name"]: float(row["value"]) for row in rows}

    def test_a_row_is_there_at_once_and_one_that_was_cut_is_told_again(self, tmp_path):
        killed = self.make(tmp_path)
        killed.start("mine", {})
        killed.record("compression", 1, {"loss": 0.5, "nll": 0.25})
        killed.record("compression", 2, {"loss": 0.25, "nll": 0.125})
        path = tmp_path / "compression.csv"
        assert path.read_text() == "step,loss,nll\n1,0.5,0.25\n2,0.25,0.125\n"
        path.write_text(path.read_text()[:-8])  # "2,0.2"
        logger = self.make(tmp_path)
        logger.start("mine", {})
        logger.record("compression", 3, {"loss": 0.125, "nll": 0.0})
        assert path.read_text() == "step,loss,nll\n1,0.5,0.25\n3,0.125,0.0\n"
        killed.close("failed"), logger.close("finished")


class _Told:
    """Of a logger with points ``(key, value, step)``, whose keys begin with their stage."""

    def points(self, directory):
        raise NotImplementedError

    def told(self, directory, stage):
        found = [(step, *key.split("/", 1), value) for key, value, step in self.points(directory) if "/" in key]
        return by_step((step, name, value) for step, of, name, value in found if of == stage)


class TestTensorBoardStandIn(_Told, LoggerContract):
    @pytest.fixture(autouse=True)
    def stand_in(self, monkeypatch):
        self.events = Events()
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", self.events.module())

    def make(self, directory):
        return TensorBoard(directory)

    def points(self, directory):
        assert not self.events.open
        return [
            (tag, value, step)
            for curves in self.events.scalars.values()
            for tag, points in curves.items()
            for step, value in points.items()
        ]

    def metrics(self, directory):
        return self.told(directory, "metrics")[0]

    def test_the_recipe_is_code(self, tmp_path):
        logger = self.make(tmp_path)
        logger.start("mine", {"a": {"b": 1}})
        assert self.events.texts["recipe"].splitlines() == [
            "    {",
            '      "a": {',
            '        "b": 1',
            "      }",
            "    }",
        ]
        logger.close("finished")


class TestTensorBoard(_Told, LoggerContract):
    @pytest.fixture(autouse=True)
    def a_second_between_files(self, monkeypatch):
        """Files are read in the order of their names, which begin with the second: an interruption takes one."""
        writer = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
        seconds = count(1_700_000_000)
        monkeypatch.setattr(writer, "time", SimpleNamespace(time=lambda: next(seconds)))

    def make(self, directory):
        return TensorBoard(directory)

    def points(self, directory):
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        found = []
        for each in directory.iterdir():
            events = accumulator.EventAccumulator(str(each))
            events.Reload()
            found += [(tag, e.value, e.step) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
        assert len({(tag, step) for tag, _, step in found}) == len(found)  # what was told again hides what was
        return found

    def metrics(self, directory):
        return self.told(directory, "metrics")[0]


class TestMLflowStandIn(_Told, LoggerContract):
    @pytest.fixture(autouse=True)
    def stand_in(self, monkeypatch):
        self.tracking = Tracking()
        monkeypatch.setitem(sys.modules, "mlflow", self.tracking.module())
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def make(self, directory):
        return MLflow(directory)

    def run(self, directory):
        ((uri, runs),) = self.tracking.stores.items()
        assert uri == f"sqlite:///{directory}/mlflow.db"
        (run,) = runs.values()  # one, however often it goes on
        assert run.name == "mine" and self.tracking.experiments == ["sqs-pyro"]
        return run

    def points(self, directory):
        assert self.run(directory).status in ("FINISHED", "KILLED", "FAILED")
        return self.run(directory).metrics

    def metrics(self, directory):
        return {key: value for key, value, _ in self.points(directory) if "/" not in key}

    def test_the_recipe_is_its_parameters(self, tmp_path):
        self._tell(tmp_path, {}, "interrupted")
        run = self.run(tmp_path)
        assert run.said == {
            "seed": "3",
            "compression.epochs": "2",
            "compression.include": "null",
            "compression.exclude": '["a", "b"]',
        }
        assert run.status == "KILLED"

    def test_a_server_is_the_callers_or_the_environments(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://here")
        assert MLflow(tmp_path).uri == "http://here" and MLflow(tmp_path, uri="http://there").uri == "http://there"


@pytest.mark.slow  # it makes a database for each test
@pytest.mark.filterwarnings("default")  # of what it is made of
class TestMLflow(TestMLflowStandIn):
    @pytest.fixture(autouse=True)
    def stand_in(self, monkeypatch):
        pytest.importorskip("mlflow")
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def run(self, directory):
        from kits.logger_packages import Run
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{directory}/mlflow.db")
        (found,) = client.search_runs([client.get_experiment_by_name("sqs-pyro").experiment_id])
        points = [
            (each.key, each.value, each.step)
            for key in found.data.metrics
            for each in client.get_metric_history(found.info.run_id, key)
        ]
        return Run(found.info.run_name, found.info.status, found.data.params, points)


class TestWandBStandIn(_Told, LoggerContract):
    @pytest.fixture(autouse=True)
    def stand_in(self, monkeypatch):
        self.cloud = Cloud()
        monkeypatch.setitem(sys.modules, "wandb", self.cloud.module())

    def make(self, directory):
        return WandB(directory, project="mine", mode="offline", place=directory.parent)

    def points(self, directory):
        (run,) = self.cloud.runs.values()
        assert run.name == "mine" and run.status in (0, 1, 255) and run.said["compression"]["epochs"] == 2
        return run.metrics

    def metrics(self, directory):
        (run,) = self.cloud.runs.values()
        return run.summary

    def test_it_is_asked_for_as_it_was_said(self, tmp_path):
        self._tell(tmp_path / "logs", {}, "finished")
        (called,) = self.cloud.called
        assert called["dir"] == str(tmp_path) and called["project"] == "mine" and called["mode"] == "offline"
        assert called["resume"] == "allow" and called["id"] == (tmp_path / "logs" / "run_id").read_text().strip()


@pytest.mark.slow
def test_wandb_offline_goes_on_under_its_id(tmp_path):
    wandb = pytest.importorskip("wandb")
    for step in (1, 2):
        logger = WandB(tmp_path / "logs", mode="offline", place=tmp_path)
        logger.start("mine", {"seed": 1})
        logger.record("compression", step, {"loss": 0.5, "validation_score": None})
        logger.finish({"size.ratio": 20.5})
        assert dict(wandb.run.config) == {"seed": 1} and wandb.run.summary["size.ratio"] == 20.5
        logger.close("finished")
    name = (tmp_path / "logs" / "run_id").read_text().strip()
    kept = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert {path.name for path in kept} == {f"run-{name}.wandb"} and wandb.run is None
