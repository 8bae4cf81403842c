"""A language model's run: what is written is what was measured, it goes on after Ctrl-C, it says what is wrong."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from kits import forks
from kits.language_checkpoint import LENGTH, write_checkpoint
from torch.nn import functional as F

from sqs_pyro import compress_transformer, load, size_report
from sqs_pyro.compression.blockwise.memory_plan import plan_memory
from sqs_pyro.data import Text
from sqs_pyro.errors import DataError, MissingPackageError, NetworkError, RecipeError
from sqs_pyro.integrations.pretrained import Pretrained
from sqs_pyro.networks.architectures import block_paths
from sqs_pyro.recipes import parse
from sqs_pyro.runs.files import evaluate_file, inspect_file
from sqs_pyro.runs.kinds import kind_of, load_any_recipe
from sqs_pyro.runs.language_model import run
from sqs_pyro.runs.language_model_recipe import LanguageModelRecipe, mixed, read_sequences
from sqs_pyro.runs.recipe import RunRecipe

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("blank_pictures")

FILES = {"packed.safetensors", "metrics.json", "recipe.yaml", "blocks.csv", "blocks.png", "report.html"}
FILES |= {"SHA256SUMS"}


def changed(recipe, **sections):
    values = recipe.model_dump(mode="json")
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) else section
    return parse(LanguageModelRecipe, values)


def metrics_of(directory):
    return json.loads((directory / "metrics.json").read_text())


def network(recipe):
    return transformers.AutoModelForCausalLM.from_pretrained(recipe.network.path, dtype=torch.float32).eval()


def test_a_run_directory_holds_everything_and_nothing_else(tiny_language_run, tiny_language_recipe):
    assert {path.name for path in tiny_language_run.iterdir()} == FILES
    assert {path.name for path in tiny_language_run.parent.iterdir()} == {"run"}
    written = yaml.safe_load((tiny_language_run / "recipe.yaml").read_text())
    assert parse(LanguageModelRecipe, written) == tiny_language_recipe


def perplexity_by_hand(net, path, *, last_quarter, tokens, window, stride):
    """One token after the other, from as many before it as the window allows."""
    paragraphs = Path(path).read_text().split("\n\n")
    kept = paragraphs[-len(paragraphs) // 4 :] if last_quarter else paragraphs
    words = transformers.AutoTokenizer.from_pretrained(net.name_or_path)
    ids = torch.tensor(words("\n\n".join(kept), add_special_tokens=False)["input_ids"])[:tokens]
    total = 0.0
    with torch.no_grad():
        for i in range(1, len(ids)):
            start = 0 if i <= window else stride * -(-(i - window) // stride)
            total += float(F.cross_entropy(net(input_ids=ids[None, start:i]).logits[0, -1], ids[i]))
    return torch.tensor(total / (len(ids) - 1)).exp().item()


def test_metrics_are_those_of_the_file_on_disk(tiny_language_run, tiny_language_recipe):
    metrics, asked = metrics_of(tiny_language_run), tiny_language_recipe.evaluation
    net = network(tiny_language_recipe)
    loaded = load(tiny_language_run / "packed.safetensors", net)
    loaded.name_or_path = net.name_or_path
    how = {"tokens": asked.tokens, "window": asked.window, "stride": asked.stride}
    source = tiny_language_recipe.text.source
    for name, each in (("baseline", net), ("compressed", loaded)):
        found = metrics[name]
        held_out = perplexity_by_hand(each, source, last_quarter=True, **how)
        assert found["held_out"]["perplexity"] == pytest.approx(held_out, rel=1e-4)
        foreign = perplexity_by_hand(each, asked.foreign, last_quarter=False, **how)
        assert found["foreign"]["perplexity"] == pytest.approx(foreign, rel=1e-4)
    for name in ("held_out", "foreign"):
        ratio = metrics["compressed"][name]["perplexity"] / metrics["baseline"][name]["perplexity"]
        assert metrics["perplexity_ratio"][name] == pytest.approx(ratio)
        assert 0.9 < ratio < 1.3 and ratio != 1
    assert metrics["max_logit_difference"] == 0


def test_sizes_are_those_of_the_file(tiny_language_run, tiny_language_recipe):
    packed = tiny_language_run / "packed.safetensors"
    size = metrics_of(tiny_language_run)["size"]
    assert size == size_report(packed).to_dict()
    assert size["file_bytes"] == packed.stat().st_size
    assert size["fp32_bytes"] == 4 * sum(p.numel() for p in network(tiny_language_recipe).parameters())
    assert size["bits_per_weight"] < 10  # most are codebooks and tables, in a network this small


def test_every_block_is_recorded(tiny_language_run, tiny_language_recipe):
    metrics = metrics_of(tiny_language_run)
    assert [block["block"] for block in metrics["blocks"]] == [0, 1]
    assert len(metrics["blocks"][0]["layers"]) == 7
    with (tiny_language_run / "blocks.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, block in zip(rows, metrics["blocks"], strict=True):
        assert float(row["bits"]) == block["bits"] and float(row["error"]) == block["error"]
        assert float(row["mlp.down_proj.error"]) == block["layers"]["mlp.down_proj"]["error"]
    assert metrics["calibration"] == {"read": 8, "generated": 4, "tokens": 12 * LENGTH}
    assert metrics["seconds"] == metrics["stage_seconds"]["compression"] > 0
    assert {"calibration", "baseline", "compression", "writing", "evaluation"} == set(metrics["stage_seconds"])
    assert {"python", "torch", "transformers", "sqs-pyro"} <= set(metrics["versions"])


def test_another_seed_gives_another_file(tiny_language_run, tiny_language_recipe, tmp_path):
    run(changed(tiny_language_recipe, seed=1, blockwise={"seed": 1}), tmp_path / "other")
    assert packed(tmp_path / "other") != packed(tiny_language_run)


def packed(directory):
    return (directory / "packed.safetensors").read_bytes()


def interrupt(stage, done, total, said):
    if stage == "compression" and done == 1:
        raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_ends_the_same(
    tiny_language_run, tiny_language_recipe, tmp_path, monkeypatch
):
    with pytest.raises(KeyboardInterrupt):
        run(tiny_language_recipe, tmp_path / "run", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["run.partial"]
    kept = tmp_path / "run.partial"
    assert {path.name for path in kept.iterdir()} == {"recipe.yaml", "checkpoint.pt", "blocks"}
    assert [path.name for path in (kept / "blocks").glob("block-*")] == ["block-000.pt"]
    first = torch.load(kept / "blocks" / "block-000.pt", weights_only=True)["record"]["seconds"]
    monkeypatch.setattr("sqs_pyro.runs.language_model_recipe.generate_calibration", None)  # the sequences are kept
    metrics = run(tiny_language_recipe, tmp_path / "run")
    assert metrics["blocks"][0]["seconds"] == first < metrics["seconds"]
    assert packed(tmp_path / "run") == packed(tiny_language_run)
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_blocks_of_two_networks_do_not_end_in_one_file(tiny_language_recipe, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    recipe = changed(tiny_language_recipe, network={"path": str(checkpoint)})
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run", progress=interrupt)
    write_checkpoint(checkpoint, seed=1)
    with pytest.raises(
        NetworkError, match=r"run\.partial/checkpoint\.pt' was made of another network \('.*' has other values"
    ):
        run(recipe, tmp_path / "run")
    assert (tmp_path / "run.partial" / "blocks" / "block-000.pt").exists()


def test_the_file_alone_can_be_judged_and_inspected(tiny_language_run, tiny_language_recipe, tmp_path):
    file = tiny_language_run / "packed.safetensors"
    evaluation = evaluate_file(file)
    assert evaluation["perplexity"] == metrics_of(tiny_language_run)["compressed"]
    inspection = inspect_file(file)
    assert sum(inspection["size"]["parts"].values()) == file.stat().st_size
    assert inspection["metadata"]["recipe"]["blockwise"]["bits"] == 3.5
    layers = len(block_paths(network(tiny_language_recipe))) * 7 + 2  # embedding and head
    assert len(inspection["size"]["tensors"]) == layers
    assert len(inspect_file(file, runtime=True)["runtime"]["weights"]) == layers
    moved = tmp_path / "other.yaml"
    moved.write_text(changed(tiny_language_recipe, evaluation={"foreign": None, "tokens": 100}).as_yaml())
    assert [*evaluate_file(file, data_from=moved)["perplexity"]] == ["held_out"]
    with pytest.raises(DataError, match=r"--shift noise:1 is for images, but '.*' is judged by text"):
        evaluate_file(file, shift="noise:1")


class TestStreamed:
    """One block of the checkpoint at a time, from the first step to the last."""

    @pytest.mark.slow
    def test_the_same_file_and_figures_as_in_memory(self, tiny_language_recipe, tmp_path, monkeypatch):
        even = changed(tiny_language_recipe, blockwise={"allocation": "even"}, generated=0)
        whole = run(even, tmp_path / "whole")
        streamed = changed(even, blockwise={"streamed": True})
        monkeypatch.setattr(Pretrained, "network", None)  # nothing loads the network as a whole
        with pytest.raises(KeyboardInterrupt):
            run(streamed, tmp_path / "run", progress=interrupt)
        metrics = run(streamed, tmp_path / "run")
        assert packed(tmp_path / "run") == packed(tmp_path / "whole")
        for key in ("baseline", "compressed", "size", "findings", "calibration", "max_logit_difference"):
            assert metrics[key] == whole[key], key

    def test_what_is_planned_is_what_is_done(self, tiny_language_recipe):
        even = changed(tiny_language_recipe, blockwise={"allocation": "even"}, generated=0)
        plans = [kind_of(even).plan(changed(even, blockwise={"streamed": s})) for s in (False, True)]
        assert [plan["streamed"] for plan in plans] == [False, True]
        net = network(even)
        for plan in plans:
            expected = plan_memory(net, 8, LENGTH, even.blockwise, streamed=plan["streamed"])
            assert (plan["peak"], plan["moments"]) == (expected.peak, expected.moments)
        assert plans[1]["moments"]["end"]["ends"] < plans[0]["moments"]["end"]["ends"]

    @pytest.mark.parametrize(
        ("sections", "sentence"),
        [
            ({"blockwise": {"allocation": "importance"}}, "allocation: even beside streamed: true"),
            ({"generated": 4}, "generated: 0 beside blockwise.streamed, but is 4"),
            (
                {"network": {"gguf_file": "a.gguf"}},
                "safetensors files beside blockwise.streamed: 'a.gguf' is none",
            ),
        ],
    )
    def test_what_needs_the_whole_network_is_refused(self, tiny_language_recipe, sections, sentence):
        with pytest.raises(RecipeError, match=sentence):
            changed(
                tiny_language_recipe,
                **{
                    "generated": 0,
                    **sections,
                    "blockwise": {"streamed": True, "allocation": "even", **sections.get("blockwise", {})},
                },
            )

    def test_a_network_that_is_in_memory_cannot_be_streamed(self, tiny_language_recipe):
        net = network(tiny_language_recipe)
        recipe = {"streamed": True, "allocation": "even"}
        with pytest.raises(
            RecipeError, match="this network is in memory: leave it out, or call compress_checkpoint"
        ):
            compress_transformer(net, torch.zeros(2, 8, dtype=torch.int64), recipe)


def test_transformers_is_imported_only_when_a_checkpoint_is_loaded():
    modules = "sqs_pyro.runs.language_model, sqs_pyro.runs.files"
    command = f"import sys, {modules}; assert 'transformers' not in sys.modules"
    assert forks.run(command).returncode == 0


def test_half_the_memory(tiny_language_recipe, tmp_path):
    metrics = run(changed(tiny_language_recipe, network={"dtype": "bfloat16"}, generated=0), tmp_path / "run")
    assert metrics["calibration"]["generated"] == 0
    assert 0.9 < metrics["perplexity_ratio"]["held_out"] < 1.3


def test_any_first_part_of_mixed_sequences_is_mixed():
    first, second = torch.zeros(8, 2), torch.ones(4, 2)
    kinds = mixed(first, second)[:, 0]
    assert len(kinds) == 12 and kinds.sum() == 4
    assert all(abs(float(kinds[:n].sum()) - n / 3) < 1 for n in range(1, 13))
    rows = mixed(torch.arange(3)[:, None], torch.arange(10, 13)[:, None]).flatten().tolist()
    assert rows == [0, 10, 1, 11, 2, 12]
    assert torch.equal(mixed(first, second[:0]), first)


def test_sequences_of_all_texts_are_mixed(tiny_language_recipe):
    recipe = changed(tiny_language_recipe, text={"further": ["b.txt", "c.txt"], "count": 2, "length": 3})
    text = Text("a " * 40, "held out", "a", {"b.txt": "bb " * 9, "c.txt": "ccc " * 7})
    found = read_sequences(recipe, text, lambda text, **options: {"input_ids": [*map(len, text.split())]}, None)
    assert found.tolist() == [[1] * 3, [2] * 3, [3] * 3] * 2
    same = Text("a " * 40, "held out", "b.txt", {"b.txt": "bb " * 9})  # of two directories
    found = read_sequences(recipe, same, lambda text, **options: {"input_ids": [*map(len, text.split())]}, None)
    assert found.tolist() == [[1] * 3, [2] * 3] * 2


class TestTheRecipe:
    def test_the_key_blockwise_tells_the_kinds_apart(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text("network: {path: here}\nblockwise:\n")
        assert load_any_recipe(path) == LanguageModelRecipe(network={"path": "here"})
        path.write_text("network: {name: digits_net}\ndata: {name: digits}\n")
        assert isinstance(load_any_recipe(path), RunRecipe)

    def test_the_compression_has_the_run_s_seed_unless_it_is_given(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text("network: {path: here}\nblockwise: {}\n")
        assert load_any_recipe(path, ["seed=3"]).blockwise.seed == 3
        assert load_any_recipe(path, ["seed=3", "blockwise.seed=1"]).blockwise.seed == 1

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ("blockwise.bit=3", r"Recipe key 'blockwise\.bit' is unknown: .*; did you mean 'bits'\?"),
            ("blockwise=3", "Recipe key 'blockwise' is 3, but should be"),
            (
                "evaluation.stride=600",
                "Recipe key 'evaluation' is .*, but should be a window of at least the stride",
            ),
            ("network.dtype=float64", r"Recipe key 'network\.dtype' is 'float64', but should be 'float32' or 'bf"),
            ("network.name=x", r"Recipe key 'network\.name' is unknown: allowed here are dtype, gguf_file, path"),
            ("generated=-1", "Recipe key 'generated' is -1"),
            # What keys of several sections have to do with each other is of no key.
            (
                "search={points: 5}, evaluation.tokens=null",
                r"^The recipe needs a number as evaluation\.tokens beside search, whose [^']*\.$",
            ),
        ],
    )
    def test_a_wrong_key_is_one_sentence(self, tmp_path, change, sentence):
        path = tmp_path / "recipe.yaml"
        path.write_text("network: {path: here}\nblockwise: {}\n")
        with pytest.raises(RecipeError, match=sentence):
            load_any_recipe(path, change.split(", "))


class TestSaysWhatIsWrongBeforeWork:
    """Each within a second, and nothing is left behind."""

    @pytest.fixture
    def refused(self, tiny_language_recipe, tmp_path, monkeypatch):
        def check(error, sentence, **sections):
            # Nothing that takes long has begun.
            monkeypatch.setattr("sqs_pyro.runs.language_model.run_directory", None)
            with pytest.raises(error, match=sentence) as found:
                run(changed(tiny_language_recipe, **sections), tmp_path / "out" / "run")
            assert not (tmp_path / "out").exists()
            assert "\n" not in str(found.value)

        return check

    @pytest.fixture
    def checkpoint(self, tiny_language_recipe, tmp_path):
        return Path(shutil.copytree(tiny_language_recipe.network.path, tmp_path / "checkpoint"))

    def test_no_directory(self, refused, tmp_path):
        missing = {"path": str(tmp_path / "nothing")}
        refused(
            NetworkError, r"Checkpoint directory '.*nothing' is not there: correct network\.path", network=missing
        )

    def test_a_file(self, refused, checkpoint):
        path = {"path": str(checkpoint / "config.json")}
        refused(NetworkError, r"is a file: give its directory, or a GGUF file", network=path)

    def test_a_name_that_the_hub_does_not_give(self, refused, monkeypatch):
        def offline(*args, **kwargs):
            assert not kwargs["local_files_only"]
            raise OSError("We couldn't connect to 'https://huggingface.co'.\nCheck your connection.")

        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
        sentence = (
            r"'some/model' is no directory here, and the Hugging Face hub does not give its conf.* \(We couldn"
        )
        refused(NetworkError, sentence, network={"path": "some/model"})

    def test_a_missing_shard(self, refused, checkpoint):
        next(checkpoint.glob("model-00002-of-*")).unlink()
        sentence = (
            r"The weights of '.*' cannot be loaded \(.*model-00002-of-.*\): correct network\.path, or complete"
        )
        refused(NetworkError, sentence, network={"path": str(checkpoint)})

    def test_a_damaged_shard(self, refused, checkpoint):
        next(checkpoint.glob("model-00002-of-*")).write_bytes(b"short")
        refused(
            NetworkError, r"The weights of '.*' cannot be loaded \(.*header", network={"path": str(checkpoint)}
        )

    def test_no_weights(self, refused, checkpoint):
        for path in checkpoint.glob("model*"):
            path.unlink()
        refused(NetworkError, r"The weights of '.*' cannot be loaded", network={"path": str(checkpoint)})

    @pytest.mark.parametrize(
        ("key", "value", "sentence"),
        [
            ("num_hidden_layers", 3, r"lacks 9 weights of a LlamaForCausalLM, .*'model\.layers\.2\."),
            ("intermediate_size", 64, r"lacks 6 weights of a LlamaForCausalLM, or has them in another shape"),
            (
                "model_type",
                "mamba",
                r"lacks \d+ weights of a MambaForCausalLM",
            ),
            ("model_type", "nonsense", r"The configuration of '.*' cannot be loaded \(.*`nonsense`"),
        ],
    )
    def test_a_configuration_that_does_not_fit(self, refused, checkpoint, key, value, sentence):
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps({**config, key: value}))
        refused(NetworkError, sentence, network={"path": str(checkpoint)})

    def test_no_tokenizer(self, refused, checkpoint):
        for path in checkpoint.glob("tokenizer*"):
            path.unlink()
        refused(NetworkError, r"The tokenizer of '.*' cannot be loaded", network={"path": str(checkpoint)})

    def test_no_gguf_file(self, refused, checkpoint):
        network = {"path": str(checkpoint), "gguf_file": "none.gguf"}
        refused(NetworkError, r"GGUF file 'none\.gguf' is not in '.*': correct", network=network)

    def test_a_network_that_sees_what_it_is_to_foretell(self, refused, checkpoint):
        size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
        bert = transformers.BertConfig(
            vocab_size=size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            initializer_range=0.5,
        )
        for path in checkpoint.glob("model*"):
            path.unlink()
        transformers.BertLMHeadModel(bert).save_pretrained(checkpoint)
        sentence = "BertLMHeadModel looks at the tokens that it is to foretell"
        refused(NetworkError, sentence, network={"path": str(checkpoint)})

    def test_without_transformers(self, refused, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        refused(MissingPackageError, "need the package 'transformers', which is not installed: pip install")

    def test_texts(self, refused, tmp_path):
        refused(DataError, "Text file '.*none.txt' was not found", text={"source": str(tmp_path / "none.txt")})
        refused(
            DataError, "Text file '.*none.txt' was not found", evaluation={"foreign": str(tmp_path / "none.txt")}
        )
        refused(DataError, r"gives \d+ sequences of 24 tokens, but 9999 were asked for", text={"count": 9999})
        (tmp_path / "one.txt").write_text("a")
        refused(DataError, "'foreign' has one token", evaluation={"foreign": str(tmp_path / "one.txt")})

    def test_a_further_text(self, refused, tmp_path):
        (tmp_path / "b.txt").write_text("too short")
        further = {"text": {"further": [str(tmp_path / "b.txt")]}}
        refused(DataError, r"Text '.*b\.txt': The text has \d+ tokens, fewer than one sequence", **further)
        foreign = {"foreign": str(tmp_path / "b.txt")}
        refused(RecipeError, "than the texts that are calibrated on", **further, evaluation=foreign)

    def test_too_long_for_the_network(self, refused):
        sentence = r"Recipe key 'text\.length' is 65, but LlamaForCausalLM takes at most 64 tokens"
        refused(RecipeError, sentence, text={"length": 65, "count": 1})
        refused(RecipeError, r"Recipe key 'evaluation\.window' is 65", evaluation={"window": 65})

    def test_tokens_that_the_network_does_not_know(self, refused, tmp_path):
        checkpoint = write_checkpoint(tmp_path / "few", vocab_size=100)
        refused(DataError, "but the network knows 0 to 99", network={"path": str(checkpoint)})
