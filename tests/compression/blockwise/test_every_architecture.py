"""The contract of an architecture: compressed, saved and loaded it says the same, and what is left is small."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kits import architectures
from safetensors.torch import load_file

from sqs_pyro import compress_transformer, load, save
from sqs_pyro.errors import DataError, NetworkError
from sqs_pyro.integrations import from_pretrained, save_pretrained
from sqs_pyro.networks.architectures import stack_paths
from sqs_pyro.packing.stored import stored_weights

RECIPE = {"bits": 3.5, "importance_sequences": 2, "batch_size": 3, "settle_steps": 1, "rounds": 1}
QUICK = {"bits": 3.5, "importance_sequences": 1, "batch_size": 3, "rounds": 1}  # what matters is what is loaded


def share(net, packed) -> float:
    """Return which share of the weights in the blocks is packed: all tensors there, norms and biases too."""
    inside = re.compile("|".join(re.escape(f"{path}.") for stack in stack_paths(net) for path in stack))
    weights = stored_weights(packed).items()
    compressed = sum(weight.record(name).numel for name, weight in weights if inside.match(name))
    return compressed / sum(value.numel() for name, value in net.named_parameters() if inside.match(name))


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


#: Of each kind one: decoders with and without experts, an encoder, both; the others go their ways.
FAST = ("llama", "gpt2", "mixtral", "bert", "t5")


@pytest.mark.parametrize(
    "case",
    [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in architectures.CASES if case not in FAST)],
)
def test_contract(case, tmp_path):
    net = architectures.make(case)
    before = architectures.outputs(net)
    result = compress_transformer(net, architectures.inputs(net), RECIPE)
    packed = architectures.outputs(result.network)
    assert equal(architectures.outputs(net), before), "the network itself stays as it is"
    assert {finding.kind for finding in result.findings} <= {"uncompressed", "unreached_experts"}
    assert len(result.records) == sum(map(len, stack_paths(net)))

    for name in before.keys() - {"generated"}:
        lost = (packed[name] - before[name]).square().sum() / before[name].square().sum()
        assert 0 < float(lost) < 0.25, name
    # Heads of four numbers and norms of 32: of a network of ordinary width much less is left.
    assert share(net, result.network) > 0.95

    save(result.network, tmp_path / "net.safetensors")
    assert equal(architectures.outputs(load(tmp_path / "net.safetensors", net)), packed)
    save_pretrained(result.network, tmp_path / "net")
    assert equal(architectures.outputs(from_pretrained(tmp_path / "net")), packed)
    stored = load_file(tmp_path / "net/model.safetensors")
    (guard,) = (name for name, value in stored.items() if value.shape == (0,))
    assert guard in net.state_dict(), "where this library is missing transformers sees another shape, and refuses"


def routed_to_two(net) -> None:
    """Let routers send each token to one of two experts, whatever the token is."""
    with torch.no_grad():
        for layer in net.model.layers:
            weight = layer.mlp.gate.weight
            weight.copy_(weight[0] * torch.tensor([1.0, -1.0, 0.5, 0.1])[:, None])


def test_experts_that_no_token_reaches_are_said_and_not_lost():
    net = architectures.make("mixtral", num_experts_per_tok=1)
    routed_to_two(net)
    result = compress_transformer(net, architectures.inputs(net), RECIPE)
    said = [finding for finding in result.findings if finding.kind == "unreached_experts"]
    assert [finding.site for finding in said] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert "sent no token of the calibration to experts 2, 3, which" in said[0].sentence
    for i in (2, 3):
        first = net.model.layers[0].mlp.experts
        packed = result.network.model.layers[0].mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            weight, other = getattr(first, name)[i].detach(), getattr(packed, name)[i].weight
            # Compressed by what nobody asks of it, it would be zeros, and this 1.
            assert float((other - weight).square().mean() / weight.square().mean()) < 0.4


def test_what_was_packed_in_linear_form_is_a_plain_network_again(tmp_path):
    for case, path in {"gpt2": "transformer.h.0.mlp.c_fc", "mixtral": "model.layers.0.mlp.experts"}.items():
        net = architectures.make(case)
        result = compress_transformer(net, architectures.inputs(net), RECIPE)
        save_pretrained(result.network, tmp_path / case)
        dense = from_pretrained(tmp_path / case, dequantize=True)
        assert type(dense.get_submodule(path)) is type(net.get_submodule(path))
        assert list(dense.state_dict()) == list(net.state_dict())
        given = architectures.inputs(net, count=2)
        with torch.no_grad():
            torch.testing.assert_close(dense(**given).logits, result.network(**given).logits)


@pytest.mark.parametrize("case", ["gpt2", "mixtral"])
def test_linear_form_is_saved_again_and_loads_without_its_head(case, tmp_path):
    net = architectures.make(case)
    packed = compress_transformer(net, architectures.inputs(net), RECIPE).network
    save_pretrained(packed, tmp_path / "first")
    from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / each / "model.safetensors").read_bytes() for each in ("first", "second"))
    assert first == second
    base = from_pretrained(tmp_path / "first", auto_class=type(net.base_model))
    given = architectures.inputs(net, count=2)
    with torch.no_grad():
        assert torch.equal(base(**given).last_hidden_state, packed.base_model(**given).last_hidden_state)


class TestByStructure:
    @pytest.mark.parametrize(
        ("kind", "options", "sentence"),
        [
            (
                "GPTJ",
                {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
                "in 2 blocks at 'h' the linear layers attn.q_proj, attn.k_proj, attn.v_proj |",
            ),
            (
                "Olmoe",
                {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
                | {"num_experts": 4, "num_experts_per_tok": 2},
                "self_attn.o_proj | mlp.experts.gate_up_proj.* | mlp.experts.down_proj.*, ",
            ),
        ],
    )
    def test_contract(self, kind, options, sentence, tmp_path):
        transformers = pytest.importorskip("transformers")
        ids = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
        config = getattr(transformers, f"{kind}Config")(**options, **ids)
        net = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        result = compress_transformer(net, architectures.inputs(net), RECIPE)
        (said,) = (finding for finding in result.findings if finding.kind == "by_structure")
        assert sentence in said.sentence
        inside = re.compile(r".*\.(h|layers)\.\d+\.")
        packed = sum(weight.record(name).numel for name, weight in stored_weights(result.network).items())
        assert packed / sum(p.numel() for n, p in net.named_parameters() if inside.match(n)) > 0.95
        save(result.network, tmp_path / "net.safetensors")
        assert equal(
            architectures.outputs(load(tmp_path / "net.safetensors", net)), architectures.outputs(result.network)
        )


class TestSaysWhatIsWrong:
    def test_an_input_of_a_stack_is_missing(self):
        net = architectures.make("t5")
        with pytest.raises(
            DataError, match=r"T5ForConditionalGeneration has 2 stacks of blocks, but .* only input_ids"
        ):
            compress_transformer(net, architectures.inputs(net)["input_ids"], RECIPE)

    def test_inputs_that_do_not_fit_each_other(self):
        net = architectures.make("clip")
        given = architectures.inputs(net)
        given["pixel_values"] = given["pixel_values"][:2]
        with pytest.raises(DataError, match="have 6 input_ids, 2 pixel_values examples: give as many of each"):
            compress_transformer(net, given, RECIPE)
        given["pixel_values"] = torch.full((6, 3, 16, 16), float("nan"))
        with pytest.raises(DataError, match="'pixel_values' is empty, or holds NaN"):
            compress_transformer(net, given, RECIPE)

    @pytest.mark.parametrize("case", ["falcon", "t5", "gpt2"])
    def test_what_cannot_be_streamed(self, case):
        class Elsewhere:
            whole = False

        net = architectures.make(case)
        with pytest.raises(NetworkError, match=r"cannot be streamed, .* set blockwise\.streamed to false"):
            compress_transformer(net, architectures.inputs(net), RECIPE, residency=Elsewhere())


FRESH = """
import sys, torch
import sqs_pyro
from pathlib import Path
from kits import architectures
from safetensors.torch import load_file
from sqs_pyro.integrations import from_pretrained
for directory in Path(sys.argv[1]).iterdir():
    torch.save(architectures.outputs(from_pretrained(directory)), directory / "outputs.pt")
"""


@pytest.mark.slow
def test_a_fresh_process_says_the_same(tmp_path):
    expected = {}
    for case in architectures.CASES:
        net = architectures.make(case)
        packed = compress_transformer(net, architectures.inputs(net), QUICK).network
        save_pretrained(packed, tmp_path / case)
        expected[case] = architectures.outputs(packed)
    paths = [Path(__file__).parents[2], Path(__file__).parents[3]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    subprocess.run([sys.executable, "-c", FRESH, tmp_path], env=environment, check=True)
    found = {case: equal(torch.load(tmp_path / case / "outputs.pt"), expected[case]) for case in expected}
    assert all(found.values()), found
