"""Pages in their places: a run's belongs to its directory, and is made again of what is there."""

import json
import shutil

import pytest
from kits import page_documents as made
from kits.page import Page
from typer.testing import CliRunner

from sqs_pyro.cli import app
from sqs_pyro.errors import OutputError
from sqs_pyro.runs.directory import check_output
from sqs_pyro.runs.report.documents import run_documents
from sqs_pyro.runs.report.pages import report_of, write_page
from sqs_pyro.runs.seal import SUMS, check_sealed, foreign_file

PAGE = "report.html"


def _sqs(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def run(small_run, tmp_path):
    return shutil.copytree(small_run, tmp_path / "run")


@pytest.mark.parametrize("finished", ["small_run", "tiny_language_run", "tiny_task_run"])
def test_every_kind_of_run_has_a_page_with_its_figures(finished, request):
    directory = request.getfixturevalue(finished)
    check_sealed(directory)
    page = Page((directory / PAGE).read_text(encoding="utf-8"))
    page.check()
    metrics = json.loads((directory / "metrics.json").read_text())
    size = metrics["size"]
    assert (
        page.row("the file")[1]
        == f"{size['file_bytes']:,}"
        == f"{(directory / 'packed.safetensors').stat().st_size:,}"
    )
    for tensor in size["tensors"]:
        assert page.row(tensor["name"])[5] == f"{tensor['bytes']:,}"
        assert sum(tensor["parts"].values()) == tensor["bytes"]
    if "accuracy_drop" in metrics:
        row = page.row("accuracy, %")
        assert row[1:3] == [f"{100 * metrics[which]['accuracy']:.2f}" for which in ("baseline", "compressed")]
        assert "Calibration" in page.heading()
        assert len(run_documents(directory)["layers"]) == len(size["tensors"])


def test_the_diagram_has_the_error_that_is_reported(small_run, tiny_task_run):
    for directory in (small_run, tiny_task_run):
        metrics = json.loads((directory / "metrics.json").read_text())
        for name, which in (("fp32", "baseline"), ("packed file", "compressed")):
            bins = metrics["reliability"][name]
            rows = zip(bins["confidence"], bins["accuracy"], bins["counts"], strict=True)
            error = sum(count * abs(accuracy - confidence) for confidence, accuracy, count in rows)
            assert error / sum(bins["counts"]) == pytest.approx(metrics[which]["ece"], abs=1e-9)


def test_it_is_made_again_byte_for_byte_and_the_directory_stays_whole(run):
    before, sums = (run / PAGE).read_bytes(), (run / SUMS).read_bytes()
    for damage in (b"", b"something else"):
        (run / PAGE).write_bytes(before.replace(b"<main", damage + b"<main"))
        result = _sqs("report", run)
        assert result.exit_code == 0 and result.stderr == f"Wrote {run / PAGE}\n"
        assert (run / PAGE).read_bytes() == before and (run / SUMS).read_bytes() == sums
    (run / PAGE).unlink()
    _sqs("report", run)
    check_sealed(run)
    assert {path.name for path in run.parent.iterdir()} == {"run"}


def test_what_is_as_it_was_is_not_written(run):
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    write_page(report_of([run]))
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


@pytest.mark.parametrize("listed", [True, False])
def test_a_run_of_an_older_version_gets_a_page(run, small_recipe, listed):
    for name in (PAGE, "layers.json"):
        (run / name).unlink()
    lines = (run / SUMS).read_text().splitlines(keepends=True)
    (run / SUMS).write_text("".join(line for line in lines if PAGE not in line and "layers.json" not in line))
    if not listed:
        for name in (SUMS, "fingerprint.json"):  # came with it
            (run / name).unlink()
    assert _sqs("report", run).exit_code == 0
    check_sealed(run)
    assert foreign_file(run, ()) is None or not listed
    check_output(run, small_recipe.as_yaml(), overwrite=True)
    assert "layer-panel" not in Page((run / PAGE).read_text(encoding="utf-8")).ids


def test_somebody_elses_page_stays(run, small_run):
    for name in (PAGE, "mine.html"):
        (run / name).write_text("<h1>mine</h1>")
    result = _sqs("report", run)
    assert result.exit_code == 0 and "accuracy, %" in result.stdout
    assert "No page is written" in result.stderr and "choose another path with --out" in result.stderr
    refused = _sqs("report", run, "--out", run / "mine.html")
    assert refused.exit_code == 2 and not refused.stdout
    assert (run / PAGE).read_text() == (run / "mine.html").read_text() == "<h1>mine</h1>"
    assert _sqs("report", run, "--out", run.parent / "other.html").exit_code == 0
    assert (run.parent / "other.html").read_bytes() == (small_run / PAGE).read_bytes()


def test_its_own_place_may_be_said(run, monkeypatch):
    (run / PAGE).write_text((run / PAGE).read_text().replace("<main", " <main"))
    monkeypatch.chdir(run)
    assert _sqs("report", run, "--out", PAGE).exit_code == 0
    check_sealed(run)


@pytest.mark.parametrize("name", ["history.csv", "layers.json", "recipe.yaml", "metrics.json"])
def test_what_was_altered_is_not_told(run, name):
    (run / name).write_bytes((run / name).read_bytes() + b" ")
    result = _sqs("report", run)
    assert result.exit_code == 2 and f"{name}' was altered after it was written" in result.stderr


def test_what_is_no_such_document_is_one_sentence(run):
    (run / SUMS).unlink()
    first = json.loads((run / "metrics.json").read_text())["size"]["tensors"][0]["name"]
    (run / "layers.json").write_text(json.dumps({"layers": [{"name": first}]}))
    result = _sqs("report", run)
    assert result.exit_code == 2 and "is not what `sqs compress` writes (it has no 'kept')" in result.stderr


def test_several_runs_are_compared(run, tiny_task_run, tmp_path):
    out = tmp_path / "both.html"
    result = _sqs("report", run, tiny_task_run, "--out", out)
    assert result.exit_code == 0 and result.stderr == f"Wrote {out}\n"
    page = Page(out.read_text(encoding="utf-8"))
    page.check()
    for directory in (run, tiny_task_run):
        size = json.loads((directory / "metrics.json").read_text())["size"]
        assert page.row(str(directory))[1:3] == [f"{size['file_bytes']:,}", f"{size['ratio']:.2f}"]
    document = json.loads(_sqs("report", run, tiny_task_run, "--out", out, "--json").stdout)
    assert document["runs"][str(run)]["metrics"] == json.loads((run / "metrics.json").read_text())
    assert "given twice" in _sqs("report", run, run).stderr


def test_a_packed_file_stands_for_its_run(run):
    assert report_of([run / "packed.safetensors"]).directory == run


def test_a_study_is_told_by_its_last_summary(tmp_path):
    for name in ("sweep", "compare"):
        (tmp_path / f"{name}.json").write_text(json.dumps({**made.study(), "name": name}))
    result = _sqs("report", tmp_path)
    assert result.exit_code == 0, result.output
    assert Page((tmp_path / PAGE).read_text(encoding="utf-8")).heading("h1") == ["compare"]
    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(OutputError, match="is not what `sqs compare` writes"):
        report_of([tmp_path])
