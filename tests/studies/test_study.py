"""Studies: each cell is run once, what fails is reported, and an interruption loses nothing."""

import json
import shutil

import pytest
from kits.pictures import blank

from sqs_pyro.data import load_data
from sqs_pyro.errors import OutputError
from sqs_pyro.recipes import parse
from sqs_pyro.studies.recipe import StudyRecipe
from sqs_pyro.studies.study import run_study, write_summary

BLANK = pytest.mark.usefixtures("blank_pictures")

VARIANTS = {
    "mild": {"set": {"compression.nonzero_rate": 0.5}},
    "too many components": {"set": {"compression.num_components": 256}},
    "hard": {"set": {"compression.nonzero_rate": 0.2}, "grid": {"compression.num_components": [2, 4]}},
}


@pytest.fixture(scope="module")
def study(small_recipe):
    base = small_recipe.model_dump(mode="json", exclude={"averaging", "seed", "name"})
    base["compression"] |= {"epochs": 1, "batch_norm_batches": 1}
    return parse(StudyRecipe, {"name": "small study", "base": base, "variants": VARIANTS})


@pytest.fixture(scope="module")
def baselines(small_run):
    return small_run.parent / "baselines"


@pytest.fixture(scope="module")
def finished(study, baselines, tmp_path_factory):
    directory = tmp_path_factory.mktemp("study") / "out"
    with blank():
        return directory, run_study(study, directory, baselines_dir=baselines)


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "out")


def _changed(study, **changes):
    return parse(StudyRecipe, {**study.model_dump(mode="json"), **changes})


def _stages(study, directory, baselines, **options):
    told = []
    results = run_study(
        study,
        directory,
        baselines_dir=baselines,
        progress=lambda stage, done, total, text: told.append((stage, done, total, text)),
        **options,
    )
    return results, told


def test_every_cell_is_a_run_directory(finished):
    directory, results = finished
    done = [result for result in results if result.error is None]
    assert {path.name for path in (directory / "runs").iterdir()} == {result.cell.directory for result in done}
    for result in done:
        metrics = json.loads((directory / "runs" / result.cell.directory / "metrics.json").read_text())
        assert metrics == result.metrics
        assert metrics["nonzero_rate"] == pytest.approx(result.cell.recipe.compression.nonzero_rate, abs=1e-3)
        assert metrics["validation"]["num_examples"] not in (0, metrics["compressed"]["num_examples"])


def test_a_cell_that_fails_has_its_sentence_and_loses_no_other(finished):
    _, results = finished
    assert [(result.cell.variant, result.error is None) for result in results] == [
        ("mild", True),
        ("too many components", False),
        ("hard", True),
        ("hard", True),
    ]
    assert "fewer than num_components=256" in results[1].error


@BLANK
def test_finished_cells_are_not_run_again_and_failed_ones_are(finished, copied, study, baselines):
    results, told = _stages(study, copied, baselines)
    assert [result.metrics for result in results] == [result.metrics for result in finished[1]]
    assert {stage for stage, *_ in told} == {"study"}  # nothing is compressed
    assert told[-1] == ("study", 4, 4, "too many components, seed 0: failed")


@BLANK
def test_a_study_can_grow(copied, study, baselines):
    larger = _changed(study, variants={**study.model_dump()["variants"], "new": {}})
    results, told = _stages(larger, copied, baselines)
    assert results[-1].cell.variant == "new"
    assert results[-1].metrics is not None
    assert [text for stage, _, _, text in told if stage == "study"][-1] == "new, seed 0"


@pytest.mark.slow
@BLANK
def test_an_interrupted_study_goes_on(finished, study, baselines, tmp_path):
    def interrupt(stage, done, total, text):
        if stage == "study" and text.startswith("hard (num_components=4)"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(study, tmp_path / "out", baselines_dir=baselines, progress=interrupt)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()}
    assert set(before) == {"mild-seed0", "hard-num_components=2-seed0"}
    results = run_study(study, tmp_path / "out", baselines_dir=baselines)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()}.items() >= (
        before.items()
    )
    accuracies = [result.metrics and result.metrics["compressed"] for result in results]
    assert accuracies == [result.metrics and result.metrics["compressed"] for result in finished[1]]


@BLANK
def test_a_cell_of_another_recipe_is_run_again_only_when_asked(copied, study, baselines):
    changed = _changed(study, variants={"mild": {"set": {"compression.nonzero_rate": 0.4}}})
    with pytest.raises(OutputError, match=r"run of another recipe \(compression\.nonzero_rate: 0\.5 -> 0\.4\)"):
        run_study(changed, copied, baselines_dir=baselines)
    (result,) = run_study(changed, copied, baselines_dir=baselines, overwrite=True)
    assert result.metrics["nonzero_rate"] == pytest.approx(0.4, abs=1e-3)


def test_the_directory_of_something_else_is_left_alone(copied, study, small_run, tmp_path):
    with pytest.raises(OutputError, match="holds the study 'small study', not 'other'"):
        run_study(_changed(study, name="other"), copied)
    with pytest.raises(OutputError, match="is no study"):
        run_study(study, small_run)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        run_study(study, tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name != "out"] == ["file"]


@BLANK
def test_a_damaged_study_is_refused_and_can_be_repaired(copied, study, baselines):
    kept = copied / "study.yaml"
    whole = kept.read_bytes()
    damaged = [whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :] for i in range(0, len(whole), 29)]
    for content in [b"", whole[:-1], *damaged]:
        kept.write_bytes(content)
        with pytest.raises(OutputError, match=r"study\.yaml' is damaged \(.*\): write 'name: '"):
            run_study(study, copied, baselines_dir=baselines)
    kept.write_text("name: small study")
    assert [result.error is None for result in run_study(study, copied, baselines_dir=baselines)].count(True) == 3
    assert kept.read_bytes() == whole


def test_a_finished_run_in_it_that_was_altered_is_refused(copied, study, baselines):
    metrics = copied / "runs" / "mild-seed0" / "metrics.json"
    metrics.write_bytes(metrics.read_bytes().replace(b"0", b"9", 1))
    with pytest.raises(OutputError, match=r"metrics\.json' was altered after it was written"):
        run_study(study, copied, baselines_dir=baselines)


def test_a_finished_run_of_other_data_is_run_again_only_when_asked(copied, study, baselines, monkeypatch):
    def other(recipe, seed):
        data = load_data(recipe, seed)
        data.train.dataset.tensors[0][0, 0, 0, 0] += 1
        return data

    monkeypatch.setattr("sqs_pyro.runs.images.network.load_data", other)
    with pytest.raises(OutputError, match=r"mild-seed0' holds a finished run of other data \('?training content"):
        run_study(study, copied, baselines_dir=baselines)


@BLANK
def test_two_at_a_time_are_not_let_in(copied, study, baselines):
    def again(stage, done, total, text):
        with pytest.raises(OutputError, match="in use by another process"):
            run_study(study, copied, baselines_dir=baselines)
        told.append(stage)

    told = []
    run_study(study, copied, baselines_dir=baselines, progress=again)
    assert told


@pytest.mark.parametrize("kind", ["compare", "sweep"])
def test_the_summary_is_written(copied, finished, study, kind):
    summary = write_summary(kind, study, finished[1], copied)
    assert json.loads((copied / f"{kind}.json").read_text()) == summary
    assert [(point["variant"], point["point"]) for point in summary["points"]] == [
        ("mild", ""),
        ("too many components", ""),
        ("hard", "num_components=2"),
        ("hard", "num_components=4"),
    ]
    mild, failed = summary["points"][:2]
    assert mild["mean"]["accuracy"] == finished[1][0].metrics["compressed"]["accuracy"]
    assert mild["mean"]["validation_nll"] == finished[1][0].metrics["validation"]["nll"]
    assert failed["errors"] == {"0": finished[1][1].error}
    assert (copied / f"{kind}.csv").read_text().count("\n") == 4
    assert (copied / f"{kind}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_processes_side_by_side_do_the_same(finished, study, tmp_path):
    results = run_study(study, tmp_path / "out", jobs=2)  # they train the shared baseline, one of them
    assert len(list((tmp_path / "out" / "baselines").glob("*.pt"))) == 1
    assert [result.error for result in results] == [result.error for result in finished[1]]
    both = zip(results, finished[1], strict=True)
    assert all(a.metrics["nonzero_rate"] == b.metrics["nonzero_rate"] for a, b in both if a.metrics)
