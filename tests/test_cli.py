"""The `sqs` command as its users meet it: output, options, exit codes, Ctrl-C."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from kits import forks
from typer.testing import CliRunner

import sqs_pyro.runs.images.kind
from sqs_pyro.cli import app
from sqs_pyro.kernels.native import native_kernels

pytestmark = pytest.mark.usefixtures("blank_pictures")


def _sqs(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def recipe_file(small_recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(small_recipe.as_yaml())
    return path


def test_compress_prints_one_json_document(small_run, recipe_file, tmp_path):
    baselines = small_run.parent / "baselines"
    result = _sqs("compress", recipe_file, "--out", tmp_path / "run", "--baselines", baselines, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "compression" in result.stderr


def test_compress_prints_a_table_and_takes_changes(small_run, recipe_file, tmp_path):
    baselines = small_run.parent / "baselines"
    out = tmp_path / "run"
    change = ["--set", "compression.nonzero_rate=0.5", "--set", "name=half", "--seed", "0"]
    result = _sqs("compress", recipe_file, "--out", out, "--baselines", baselines, *change)
    assert result.exit_code == 0, result.output
    assert "half, seed 0" in result.stdout
    assert "accuracy, %" in result.stdout
    assert json.loads((out / "metrics.json").read_text())["nonzero_rate"] == pytest.approx(0.5, abs=1e-3)


def test_findings_go_to_stderr_once_and_into_the_report(small_run, recipe_file, tmp_path):
    out = tmp_path / "run"
    change = ["--set", "compression.nonzero_rate=0.002", "--set", "averaging=null"]
    result = _sqs("compress", recipe_file, "--out", out, "--baselines", small_run.parent / "baselines", *change)
    sentences = [finding["sentence"] for finding in json.loads((out / "metrics.json").read_text())["findings"]]
    assert sentences
    for sentence in sentences:
        assert result.stderr.count(sentence) == 1
        assert sentence not in result.stdout
    shown = " ".join(_sqs("report", out).stdout.split())
    assert all(f"finding: {' '.join(sentence.split())}" in shown for sentence in sentences)


def test_a_finished_run_is_replaced_only_when_asked(small_run, recipe_file, tmp_path):
    arguments = ["compress", recipe_file, "--out", tmp_path / "run", "--baselines", small_run.parent / "baselines"]
    arguments += ["--set", "averaging=null", "--set", "compression.epochs=1"]
    assert _sqs(*arguments).exit_code == 0
    refused = _sqs(*arguments)
    assert refused.exit_code == 2
    assert "already holds a finished run" in refused.stderr
    assert refused.stdout == ""
    assert _sqs(*arguments, "--overwrite").exit_code == 0


@pytest.fixture
def study_file(small_recipe, tmp_path):
    base = yaml.safe_load(small_recipe.as_yaml())
    base["compression"]["epochs"], base["averaging"] = 1, None
    variants = {"mild": {}, "impossible": {"set": {"compression.num_components": 200}}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", "base": base, "variants": variants}))
    return path


def test_a_study_reports_what_failed_and_keeps_the_rest(small_run, study_file, tmp_path):
    out = tmp_path / "study"
    arguments = [study_file, "--out", out, "--baselines", small_run.parent / "baselines"]
    for kind in ("compare", "sweep"):  # the second runs again only what failed
        result = _sqs(kind, *arguments)
        assert result.exit_code == 2
        assert "fewer than num_components=200" in " ".join(result.stdout.split())
        assert result.stderr.splitlines()[-1] == "error: 1 of 2 runs failed, see above."
        assert (out / f"{kind}.png").exists()
    for kind in ("compare", "sweep"):
        repaired = _sqs(kind, *arguments, "--set", "variants.impossible.set={}", "--json")
        assert repaired.exit_code == 0, repaired.output
        summary = json.loads(repaired.stdout)
        assert summary == json.loads((out / f"{kind}.json").read_text())
        first, second = summary["points"]
        assert first["by_seed"]["accuracy"] == second["by_seed"]["accuracy"]  # the same recipe under two labels


def test_a_study_that_is_wrong_leaves_nothing(study_file, tmp_path):
    result = _sqs("compare", study_file, "--out", tmp_path / "study", "--set", "variants.mild.sets={}")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: Recipe key 'variants.mild.sets' is unknown")
    result = _sqs("sweep", study_file, "--out", tmp_path / "study", "--seeds", "0,0")
    assert result.exit_code == 2
    assert result.stderr == "error: Recipe key 'seeds' has the value 0 twice: keep one.\n"
    assert not (tmp_path / "study").exists()


def test_evaluate_agrees_with_the_run(small_run):
    result = _sqs("evaluate", small_run / "packed.safetensors", "--json")
    assert result.exit_code == 0, result.output
    metrics = json.loads((small_run / "metrics.json").read_text())
    assert json.loads(result.stdout)["accuracy"] == metrics["compressed"]["accuracy"]
    table = _sqs("evaluate", small_run / "packed.safetensors")
    assert f"{100 * metrics['compressed']['accuracy']:.2f}" in table.stdout


def test_evaluate_takes_the_data_of_another_recipe(small_run, recipe_file):
    result = _sqs("evaluate", small_run / "packed.safetensors", "--data", recipe_file, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["data"]["name"] == "digits"


def test_evaluate_and_inspect_a_file_of_draws(small_run):
    """It is found, rebuilt and evaluated like any other packed file, and gives the run's figures."""
    ensemble = small_run / "ensemble.safetensors"
    averaged = json.loads((small_run / "metrics.json").read_text())["averaged"]
    found = json.loads(_sqs("evaluate", ensemble, "--json").stdout)
    assert {name: found[name] for name in ("accuracy", "nll", "ece", "brier", "entropy")} == {
        name: averaged[name] for name in ("accuracy", "nll", "ece", "brier", "entropy")
    }
    inspection = json.loads(_sqs("inspect", ensemble, "--json").stdout)
    assert (inspection["size"]["draws"], inspection["format_version"]) == (averaged["samples"], 5)
    assert sum(inspection["size"]["parts"].values()) == ensemble.stat().st_size == averaged["file_bytes"]
    assert "draws in it" in _sqs("inspect", ensemble).stdout


def test_evaluate_on_shifted_images(small_run):
    packed = small_run / "packed.safetensors"
    plain, noisy = (
        json.loads(_sqs("evaluate", packed, "--json", *shift).stdout) for shift in ([], ["--shift", "noise:3"])
    )
    assert noisy["accuracy"] < plain["accuracy"] and noisy["shift"] == "noise:3" and plain["shift"] is None
    refused = _sqs("evaluate", packed, "--shift", "blur:1")
    assert refused.exit_code == 2 and "Shift 'blur:1' is unknown" in refused.stderr


def test_plan_needs_no_weights(tmp_path):
    config = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    about = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 50}
    (tmp_path / "config.json").write_text(json.dumps({**about, **config}))
    plan = json.loads(_sqs("plan", tmp_path, "--sequences", "8", "--length", "16", "--json").stdout)
    assert plan["tokens"] == 128
    assert plan["peak"] == max(sum(parts.values()) for parts in plan["moments"].values())
    table = " ".join(_sqs("plan", tmp_path, "--whole", "--set", "bits=4").stdout.split())  # long paths break lines
    assert "the whole network in memory" in table and "gradients" in table
    assert plan["unfit"] is plan["device_memory"] is None and plan["time"]["efficiency"] == 1
    assert sum(plan["time"]["parts"].values()) == plan["time"]["seconds"]
    shared = ["plan", tmp_path / "config.json", "--ranks", "4", "--machine", "h100"]
    enough = " ".join(_sqs(*shared, "--device-memory", "1GB").stdout.split())
    assert "1.00 GB are enough" in enough and "each of 4 ranks" in enough and "H100" in enough
    refused = _sqs(*shared, "--device-memory", "400MB")
    assert refused.exit_code == 2 and "Each of 4 ranks needs 0.5 GB" in refused.stderr
    refused = _sqs(*shared, "--device-memory", "large")
    assert refused.exit_code == 2 and "--device-memory is 'large', but must be a size such as" in refused.stderr
    refused = _sqs(*shared, "--machine", "abacus")
    assert refused.exit_code == 2 and "Machine 'abacus' is unknown: give one of cpu, h100." in refused.stderr
    refused = _sqs("plan", tmp_path, "--set", "allocation=importance")
    assert refused.exit_code == 2 and "add --whole" in refused.stderr
    recipe = tmp_path / "recipe.yaml"
    text = "text: {count: 8, length: 16}"
    recipe.write_text(f"network: {{path: {tmp_path}}}\n{text}\nblockwise: {{allocation: even, streamed: true}}\n")
    assert json.loads(_sqs("plan", recipe, "--json").stdout) == plan
    assert not json.loads(_sqs("plan", recipe, "--set", "blockwise.streamed=false", "--json").stdout)["streamed"]
    refused = _sqs("plan", recipe, "--whole")
    assert refused.exit_code == 2 and "are for a checkpoint, but" in refused.stderr
    refused = _sqs("plan", tmp_path / "nowhere")
    assert refused.exit_code == 2 and "no config.json" in refused.stderr


def test_inspect_shows_every_byte(small_run):
    packed = small_run / "packed.safetensors"
    inspection = json.loads(_sqs("inspect", packed, "--json").stdout)
    assert sum(inspection["size"]["parts"].values()) == packed.stat().st_size
    table = _sqs("inspect", packed).stdout
    assert f"{packed.stat().st_size:,}" in table
    assert all(tensor["name"] in table for tensor in inspection["size"]["tensors"])


def test_inspect_says_what_weights_are_at_run_time(small_run):
    packed = small_run / "packed.safetensors"
    runtime = json.loads(_sqs("inspect", packed, "--runtime", "--json").stdout)["runtime"]
    assert runtime["machine"]["processor"]
    kernels = native_kernels("tiled")
    assert {weight["form"] for weight in runtime["weights"]} == {"tiled" if kernels else "dense"}
    table = _sqs("inspect", packed, "--runtime").stdout
    assert all(weight["name"] in table for weight in runtime["weights"])
    assert ("multiply with the codes" if kernels else "no compiled kernels") in table


def test_report_shows_a_finished_run(small_run, tmp_path):
    measured = {name: json.loads((small_run / f"{name}.json").read_text()) for name in ("metrics", "bounds")}
    assert json.loads(_sqs("report", small_run, "--json").stdout) == measured
    table = _sqs("report", small_run).stdout
    total = measured["bounds"]["temperatures"][0]["total"]
    assert f"{100 * measured['metrics']['compressed']['accuracy']:.2f}" in table
    assert f"{measured['metrics']['size']['file_bytes']:,}" in table
    assert f"{total['jensen'] / total['num_weights']:.4f}" in table
    refused = _sqs("report", tmp_path)
    assert refused.exit_code == 2
    assert "is no finished run (it holds no metrics.json)" in refused.stderr
    (tmp_path / "metrics.json").write_text("{")
    assert "metrics.json' is no JSON" in _sqs("report", tmp_path).stderr


def test_export_prints_a_table_or_one_json_document(small_run, tmp_path):
    packed, out = small_run / "packed.safetensors", tmp_path / "dense.safetensors"
    arguments = ["export", packed, "--format", "dense", "--out", out, "--input-shape", "1,8,8"]
    result = _sqs(*arguments, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["total_bytes"] == out.stat().st_size and document["example"] == "random numbers [4, 1, 8, 8]"
    assert result.stderr == f"Wrote {out}\n"
    refused = _sqs(*arguments)
    assert refused.exit_code == 2 and refused.stderr.startswith(f"error: '{out}' exists")
    table = _sqs(*arguments, "--overwrite", "--dtype", "bfloat16").stdout
    assert "bfloat16" in table and f"{out.stat().st_size:,}" in table and f"{document['packed_bytes']:,}" in table
    assert all(name in table for name in document["decoded"])
    refused = _sqs(*arguments[:-1], "1,x,8")
    assert refused.exit_code == 2 and "--input-shape has '1,x,8'" in refused.stderr


@pytest.fixture
def language_recipe_file(tiny_language_recipe, tmp_path):
    path = tmp_path / "language.yaml"
    path.write_text(tiny_language_recipe.as_yaml())
    return path


def test_a_language_model_from_the_command_line(language_recipe_file, tmp_path):
    out = tmp_path / "run"
    result = _sqs("compress", language_recipe_file, "--out", out, "--set", "evaluation.tokens=100", "--json")
    assert result.exit_code == 0, result.output
    metrics = json.loads((out / "metrics.json").read_text())
    assert json.loads(result.stdout) == metrics
    lines = result.stderr.splitlines()
    assert any(line.startswith("compression 2/2 ") and "bits a weight" in line for line in lines), lines
    assert lines[-1] == f"Wrote {out}"
    assert {line.split()[0] for line in lines[:-1]} <= {"calibration", "compression", "perplexity", "finding:"}
    refused = _sqs("compress", language_recipe_file, "--out", out)
    assert refused.exit_code == 2 and "already holds a finished run" in refused.stderr


def test_tables_of_a_language_model(tiny_language_run):
    metrics = json.loads((tiny_language_run / "metrics.json").read_text())
    packed = tiny_language_run / "packed.safetensors"
    report = _sqs("report", tiny_language_run).stdout
    for name in ("held_out", "foreign"):
        assert f"{metrics['baseline'][name]['perplexity']:.3f}" in report
        assert f"{metrics['perplexity_ratio'][name]:.4f}" in report
    assert f"{metrics['blocks'][1]['error']:.5f}" in report and f"{packed.stat().st_size:,}" in report
    evaluated = json.loads(_sqs("evaluate", packed, "--json").stdout)
    assert evaluated["perplexity"] == metrics["compressed"]
    assert f"{metrics['compressed']['foreign']['perplexity']:.3f}" in _sqs("evaluate", packed).stdout
    inspection = json.loads(_sqs("inspect", packed, "--json").stdout)
    assert inspection["metadata"]["recipe"]["name"] == "tiny"


def test_a_language_model_that_is_not_there_is_one_sentence(language_recipe_file, tmp_path):
    out = tmp_path / "run"
    missing = f"network.path={tmp_path / 'none'}"
    refused = _sqs("compress", language_recipe_file, "--out", out, "--set", missing)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: Checkpoint directory '") and refused.stderr.count("\n") == 1
    refused = _sqs("compress", language_recipe_file, "--out", out, "--baselines", tmp_path)
    assert refused.stderr == "error: --baselines is for networks that are trained here: leave it out.\n"
    assert not out.exists()


def test_a_bug_keeps_its_traceback(recipe_file, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(sqs_pyro.runs.images.kind, "run", broken)
    result = _sqs("compress", recipe_file, "--out", tmp_path / "run")
    assert isinstance(result.exception, ZeroDivisionError)


def test_help_answers_without_loading_the_library():
    command = "import sys; from sqs_pyro.cli import app\ntry: app(['--help'])\nexcept SystemExit: pass\n"
    check = "assert not {'matplotlib', 'torchvision', 'sklearn', 'transformers'} & set(sys.modules), 'heavy'"
    assert forks.run(command + check).returncode == 0


@pytest.mark.slow
def test_ctrl_c_in_a_study_then_the_same_command(study_file, tmp_path):
    def interrupted(out, epochs):
        arguments = [Path(sys.executable).parent / "sqs", "compare", study_file, "--out", out, "--jobs", "2"]
        arguments += [
            "--set",
            "variants.impossible.set={}",
            "--set",
            f"base.compression.epochs={epochs}",
            "--json",
        ]
        arguments += ["--set", "base.baseline.epochs=1"]
        process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while not (seen := list(out.glob("runs/*.partial/checkpoint.pt"))) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stdout, said = process.communicate(timeout=60)
        assert (process.returncode, stdout) == (130, ""), said
        assert "Interrupted: the same command goes on" in said
        assert "Traceback" not in said
        # No work is lost: what had a checkpoint has it, or was faster than the signal and has finished.
        for checkpoint in seen:
            finished = checkpoint.parent.with_suffix("") / "metrics.json"
            assert checkpoint.exists() or finished.exists(), (said, sorted(out.rglob("*")))
        return arguments

    # Where the machine is so busy that nothing was interrupted but the beginning, it is tried with longer runs.
    for epochs in (8, 32, 128):
        out = tmp_path / f"study-{epochs}"
        arguments = interrupted(out, epochs)
        if list(out.glob("runs/*.partial/checkpoint.pt")):
            break
    assert list(out.glob("runs/*.partial/checkpoint.pt"))
    again = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert all(len(point["seeds"]) == 1 for point in json.loads(again.stdout)["points"])
    assert not list(out.glob("runs/*.partial"))


@pytest.mark.slow
def test_ctrl_c_then_the_same_command(recipe_file, tmp_path):
    arguments = [Path(sys.executable).parent / "sqs", "compress", recipe_file, "--out", tmp_path / "run"]
    arguments += ["--set", "compression.epochs=12", "--set", "baseline.epochs=1"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    said = next(line for line in process.stderr if line.startswith("compression"))
    process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Interrupted: the same command goes on from the last checkpoint" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
    again = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "baseline" not in again.stderr  # it is not trained again
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["seconds"] == metrics["stage_seconds"]["compression"]


@pytest.mark.slow
def test_ctrl_c_in_a_language_model_then_the_same_command(language_recipe_file, tiny_language_run, tmp_path):
    out = tmp_path / "run"
    arguments = [Path(sys.executable).parent / "sqs", "compress", language_recipe_file, "--out", out]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not list(out.parent.glob("run.partial/checkpoint.pt")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)  # in the first block, or just before it
    stdout, said = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, ""), said
    assert "Interrupted: the same command goes on" in said and "Traceback" not in said
    assert not out.exists()
    subprocess.run(arguments, capture_output=True, check=True)
    finished = [directory / "packed.safetensors" for directory in (out, tiny_language_run)]
    assert finished[0].read_bytes() == finished[1].read_bytes()
