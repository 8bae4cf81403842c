"""The lm-evaluation-harness on packed checkpoints, against this library's own perplexity."""

import json
import math
import sys

import pytest
import torch
from kits import forks, language_checkpoint

from sqs_pyro.compression.blockwise.call import compress_transformer
from sqs_pyro.errors import NetworkError
from sqs_pyro.evaluation.perplexity import perplexity
from sqs_pyro.integrations import save_pretrained
from sqs_pyro.integrations.evaluation_harness import harness_model

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own

TEXT = "a packed network says what it was taught, no less and no more than that. " * 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A packed checkpoint with its tokenizer."""
    directory = tmp_path_factory.mktemp("harness")
    path = language_checkpoint.write_checkpoint(directory / "dense", max_position_embeddings=512)
    net = language_checkpoint.transformers.AutoModelForCausalLM.from_pretrained(path)
    sequences = torch.randint(3, net.config.vocab_size, (8, 24), generator=torch.Generator().manual_seed(0))
    result = compress_transformer(net.eval(), sequences, {"bits": 3.0, "allocation": "even"})
    save_pretrained(result.network, directory / "packed", language_checkpoint.tokenizer())
    return directory / "packed", result.network


def own_log_probability(net, text):
    """Of a text behind the token that the harness puts before it."""
    words = language_checkpoint.tokenizer()
    ids = torch.tensor([[words.bos_token_id, *words(text)["input_ids"]]])
    result = perplexity(net, ids, window=512, stride=512)
    assert result.tokens == ids.shape[1] - 1
    return -result.nll * result.tokens


def test_says_what_the_packed_network_says(checkpoint):
    from lm_eval.api.instance import Instance

    directory, packed = checkpoint
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(TEXT,), idx=0)
    for network in (
        harness_model(directory, device="cpu"),
        harness_model(packed, language_checkpoint.tokenizer()),
    ):
        (found,) = network.loglikelihood_rolling([request], disable_tqdm=True)
        assert found == pytest.approx(own_log_probability(packed, TEXT), rel=1e-5)


@pytest.mark.slow  # importing all of the harness takes many seconds
def test_command_line_reads_packed_checkpoints(checkpoint, tmp_path):
    directory, packed = checkpoint
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT}) + "\n", encoding="utf-8")
    (tmp_path / "own_text.yaml").write_text(
        "task: own_text\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'text.jsonl'}}}}}\n"
        "test_split: test\n"
        "output_type: loglikelihood_rolling\n"
        "doc_to_text: ''\n"
        "doc_to_target: '{{text}}'\n"
        "metric_list: [{metric: byte_perplexity}]\n",
        encoding="utf-8",
    )
    options = ["--model", "hf", "--device", "cpu", "--tasks", "own_text"]
    options += ["--model_args", f"pretrained={directory},max_length=512"]
    options += ["--include_path", tmp_path, "--output_path", tmp_path / "results"]
    command = "import runpy; runpy.run_module('sqs_pyro.integrations.evaluation_harness', run_name='__main__')"
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = forks.run(command, *options, environment=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "results").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["own_text"]["byte_perplexity,none"]
    assert found == pytest.approx(math.exp(-own_log_probability(packed, TEXT) / len(TEXT.encode())), rel=1e-5)


def test_a_module_needs_its_tokenizer(checkpoint):
    with pytest.raises(NetworkError, match="does not bring its tokenizer"):
        harness_model(checkpoint[1])


def test_without_the_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ModuleNotFoundError, match=r"sqs-pyro\[harness\]"):
        harness_model("anywhere")
