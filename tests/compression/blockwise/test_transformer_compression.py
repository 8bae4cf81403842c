"""A transformer in one call: every architecture, and what it says of impossible input."""

import re
import statistics

import pytest
import torch

from sqs_pyro import compress_transformer, load, save, size_report
from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.errors import DataError, NetworkError, RecipeError
from sqs_pyro.packing.stored import stored_weights
from sqs_pyro.recipes import parse

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
#: The blocks' layers alone; embedding and head: test_vocabulary.py.
RECIPE = {"bits": 3.5, "importance_sequences": 4, "batch_size": 4, "embedding": False, "head": False}


def make(kind, head, **changes):
    torch.manual_seed(0)
    few = {} if kind == "Bert" else {"num_key_value_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **few, **changes})
    return getattr(transformers, f"{kind}{head}")(config).eval()


def sequences(count=8, length=16):
    return torch.randint(0, 48, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "head", "layers"),
    [
        ("Llama", "ForCausalLM", 7),
        ("Qwen2", "ForCausalLM", 7),
        ("Qwen3", "Model", 7),
        ("Bert", "Model", 6),
        ("Bert", "ForSequenceClassification", 6),
        ("Bert", "ForQuestionAnswering", 6),
    ],
)
def test_each_architecture(kind, head, layers, tmp_path):
    net = make(kind, head)
    result = compress_transformer(net, sequences(), RECIPE, metadata={"metrics": {"of": kind}})
    save(result.network, tmp_path / "net.safetensors")
    report = size_report(tmp_path / "net.safetensors")
    assert len(report.tensors) == 2 * layers
    inside = {row.name for row in report.tensors}
    left = [n for n, p in net.named_parameters() if p.dim() == 2 and n not in inside]
    assert not [n for n in left if ".layers." in n or ".layer." in n or n.startswith(("layers.", "encoder."))]
    loaded, x = load(tmp_path / "net.safetensors", net), sequences()
    with torch.no_grad():
        first, second, original = (each(input_ids=x)[0] for each in (result.network, loaded, net))
    assert torch.equal(first, second)
    assert float((first - original).square().sum() / original.square().sum()) < 0.2
    assert loaded.packed_metadata["recipe"]["bits"] == 3.5
    assert loaded.packed_metadata["metrics"] == {"of": kind}


def test_finished_blocks_are_kept(tmp_path):
    net, told = make("Llama", "ForCausalLM"), []
    compress_transformer(net, sequences(), RECIPE, directory=tmp_path / "blocks", progress=told.append)
    assert [record.block for record in told] == [0, 1]
    assert len(list((tmp_path / "blocks").glob("block-*.pt"))) == 2


class TestSaysWhatIsWrong:
    def test_a_network_that_is_no_transformer(self):
        with pytest.raises(NetworkError, match="Linear has no model_type"):
            compress_transformer(torch.nn.Linear(2, 2), sequences())

    def test_an_unknown_key(self):
        with pytest.raises(RecipeError, match=r"'blockwise\.bit' is unknown"):
            compress_transformer(make("Llama", "ForCausalLM"), sequences(), {"bit": 3})

    def test_sequences(self):
        net = make("Llama", "ForCausalLM")
        with pytest.raises(DataError, match=r"shape \[16\] were given"):
            compress_transformer(net, sequences()[0])
        with pytest.raises(DataError, match="belongs to the network"):
            compress_transformer(net, sequences() + 30)
        with pytest.raises(DataError, match="have 40 tokens, but LlamaForCausalLM takes at most 32"):
            compress_transformer(net, sequences(length=40))


class TestShips:
    def test_what_no_file_holds_is_refused_before_any_block(self):
        net, told = make("Llama", "ForCausalLM"), []
        net.register_buffer("table", torch.zeros(4, dtype=torch.float8_e4m3fn))
        with pytest.raises(NetworkError, match=r"'table' is torch\.float8_e4m3fn, which cannot be stored"):
            compress_transformer(net, sequences(), RECIPE, progress=told.append)
        assert not told

    def test_packed_computes_what_is_judged_and_the_rest_is_said(self, monkeypatch):
        def compared(dense, packed, inputs):
            seen.append((dense(**inputs).logits, packed(**inputs).logits))

        seen = []
        monkeypatch.setattr("sqs_pyro.compression.blockwise.blocks.check_agreement", compared)
        result = compress_transformer(make("Llama", "ForCausalLM"), sequences(2), RECIPE)
        ((dense, packed),) = seen
        torch.testing.assert_close(packed, dense, rtol=1e-4, atol=1e-4)
        assert [finding.kind for finding in result.findings] == ["uncompressed"]
        assert "embed_tokens.weight" in result.findings[0].sentence


class TestLayersOfTheirOwn:
    def test_bits_for_all_are_the_recipes(self):
        net, even = make("Llama", "ForCausalLM"), {**RECIPE, "allocation": "even"}
        by_pattern = compress_transformer(net, sequences(), {**even, "bits": 2, "layers": {"*": {"bits": 3.5}}})
        by_recipe = compress_transformer(net, sequences(), even)
        for one, other in zip(by_pattern.network.parameters(), by_recipe.network.parameters(), strict=True):
            assert torch.equal(one, other)
        with torch.no_grad():
            first, second = (each.network(input_ids=sequences()).logits for each in (by_pattern, by_recipe))
        assert torch.equal(first, second)

    def test_each_has_what_was_asked(self):
        net = make("Llama", "ForCausalLM")
        own = {
            "*.down_proj": {"bits": 4.5},
            "model.layers.0.*": {"skip": True},
            "*.0.mlp.up_proj": {"skip": False},
        }
        result = compress_transformer(net, sequences(), {**RECIPE, "settle_steps": 1, "layers": own})
        first, second = result.records
        assert list(first.layers) == ["mlp.up_proj"] and len(second.layers) == 7
        assert second.layers["mlp.down_proj"]["bits"] == pytest.approx(4.5, abs=0.35)
        weights = {name: value.numel() for name, value in net.model.layers[1].named_parameters()}
        rest = {name: layer["bits"] for name, layer in second.layers.items() if name != "mlp.down_proj"}
        rest["mlp.up_proj "] = first.layers["mlp.up_proj"]["bits"]
        total = sum(weights[f"{name.strip()}.weight"] for name in rest)
        mean = sum(bits * weights[f"{name.strip()}.weight"] for name, bits in rest.items()) / total
        assert mean == pytest.approx(3.5, abs=0.25), "those without bits of their own have the recipe's"
        kept = result.network.model.layers[0].self_attn.q_proj.weight
        assert torch.equal(kept, net.model.layers[0].self_attn.q_proj.weight.half().float())

    def test_a_block_that_is_left_as_it_is(self, tmp_path):
        net = make("Llama", "ForCausalLM")
        recipe = {**RECIPE, "settle_steps": 1, "layers": {"model.layers.1.*": {"skip": True}}}
        for _ in range(2):  # the second finds its blocks
            result = compress_transformer(net, sequences(), recipe, directory=tmp_path / "blocks")
            assert [record.bits is None for record in result.records] == [False, True]
            assert result.records[1].layers == {} and re.search(r"\n1 +-  ", str(result))
        assert {row.name.split(".")[2] for row in size_report(result.network).tensors} == {"0"}

    @pytest.mark.parametrize(
        ("own", "sentence"),
        [
            (
                {"lm_head": {"skip": True}},
                r"'lm_head', which no .*model\.layers\.0\.self_attn\.q_proj.*2 more",
            ),
            ({"*": {"skip": True}}, "'blockwise.layers' leaves all layers uncompressed"),
        ],
    )
    def test_patterns_that_say_nothing(self, own, sentence):
        with pytest.raises(RecipeError, match=sentence):
            compress_transformer(make("Llama", "ForCausalLM"), sequences(), {**RECIPE, "layers": own})


class TestRuntimeBits:
    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_codes_in_memory_take_no_more(self, bits):
        recipe = {**RECIPE, "bits": bits - 0.5, "runtime_bits": bits}
        packed = compress_transformer(make("Llama", "ForCausalLM"), sequences(), recipe).network
        found = stored_weights(packed)
        assert len(found) == 14
        assert max(weight.bits for weight in found.values()) == bits  # of a code, a zero's included
        for weight in found.values():
            codes = max((buffer for buffer in weight.buffers()), key=lambda buffer: buffer.nbytes)
            rows, columns = weight.shape
            # In pairs of 16-bit words, by whole tiles of 16 rows: of 3-bit codes five are in a word.
            pairs = -(-columns // (2 * (16 // bits))) * -(-rows // 16) * 16
            assert codes.nbytes <= 4 * pairs

    def test_of_single_layers(self):
        own = {"*.v_proj": {"runtime_bits": 4}, "*.k_proj": {"runtime_bits": 2, "bits": 1.5}}
        recipe = {**RECIPE, "bits": 3.0, "runtime_bits": 3, "layers": own}
        net = make("Llama", "ForCausalLM", hidden_size=96, intermediate_size=160)
        found = stored_weights(compress_transformer(net, sequences(), recipe).network)
        expected = {"v_proj.weight": 4, "k_proj.weight": 2}
        for name, weight in found.items():
            coded = weight.coded()
            symbols = torch.where(coded.mask, coded.codes.int() + 1, 0).unique()
            assert weight.bits == expected.get(".".join(name.split(".")[-2:]), 3)
            assert len(symbols) <= 2**weight.bits  # counted, not what the codebook says
            assert coded.scales is None  # no output has a finer grid where values are few

    def test_decides_what_is_left_out(self):
        recipe = parse(BlockwiseRecipe, {"runtime_bits": 3}, "blockwise")
        assert (recipe.num_components, recipe.bits) == (7, 2.75)
        assert parse(BlockwiseRecipe, {"num_components": 7}, "blockwise").bits == 2.75
        assert parse(BlockwiseRecipe, {"num_components": 15}, "blockwise").bits == 3.2
        sized = parse(BlockwiseRecipe, {"runtime_bits": 2, "megabytes": 3, "num_components": 2}, "blockwise")
        assert (sized.num_components, sized.bits) == (2, None)

    @pytest.mark.parametrize(
        ("keys", "sentence"),
        [
            (
                {"runtime_bits": 3, "num_components": 8},
                "at most 7 beside runtime_bits: 3, but it is 8: leave it out",
            ),
            ({"runtime_bits": 2, "bits": 2.1}, "bits: at most 2.00, which zero and num_components: 3 values can"),
            ({"num_components": 4, "bits": 2, "layers": {"*": {"bits": 3}}}, "at most 2.32, .* but it is 3"),
            (
                {"runtime_bits": 4, "bits": 3, "layers": {"*": {"bits": 3, "runtime_bits": 2}}},
                "at most 2.00, which zero and num_components: 3 values can take, but it is 3",
            ),
            ({"layers": {"*": {"runtime_bits": 6}}}, "runtime_bits"),
            ({"runtime_bits": 5}, "runtime_bits"),
        ],
    )
    def test_what_contradicts_it(self, keys, sentence):
        with pytest.raises(RecipeError, match=sentence):
            parse(BlockwiseRecipe, keys, "blockwise")

    def test_more_bits_than_the_values_of_this_network_take(self):
        recipe = {**RECIPE, "bits": 4.0, "num_components": 15, "channel_scales": False}
        net = make("Llama", "ForCausalLM", hidden_size=96, intermediate_size=160)  # whose tables weigh little
        result = compress_transformer(net, sequences(), recipe)
        (said,) = (each for each in result.findings if each.kind == "few_values")
        assert re.match(
            r"The network has 9\d\.\d% of the 4\.00 bits .* zero and 15 values take no more", said.sentence
        )
        took = [record.bits for record in result.records]
        assert 4 * said.measured == pytest.approx(statistics.fmean(took), abs=0.01) and max(took) < 3.9
        enough = compress_transformer(net, sequences(), {**recipe, "num_components": 31})
        assert not any(each.kind == "few_values" for each in enough.findings)
