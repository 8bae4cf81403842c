"""Embedding and head of a whole network: what is coded, in which order, how large the file is, and resuming."""

import copy
import os
import signal

import pytest
import torch
from kits import architectures, forks
from kits.even_grid import rounded_to
from torch import nn

from sqs_pyro import compress_transformer, load, save, size_report
from sqs_pyro.compression.blockwise import one_block
from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.compression.blockwise.store import BlockStore
from sqs_pyro.compression.blockwise.vocabulary import Vocabulary, counted_tokens, rows_of, vocabulary_of
from sqs_pyro.errors import NetworkError, RecipeError
from sqs_pyro.networks.architectures import architecture_of, blocks, vocabulary_paths
from sqs_pyro.networks.block_stack import BlockStack, run_block
from sqs_pyro.packing.stored import stored_weights

transformers = pytest.importorskip("transformers")
V = 96
RECIPE = {"bits": 3.0, "importance_sequences": 4, "batch_size": 4, "num_components": 15, "rounds": 1}
ONLY_TABLES = {"layers": {"model.layers.*": {"skip": True}}}


def make(kind="Llama", head="ForCausalLM", tied=True, width=32, depth=1, **changes):
    torch.manual_seed(0)
    options = {
        "vocab_size": V,
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
        **({} if kind == "Bert" else {"num_key_value_heads": 2}),
        **changes,
    }
    config = getattr(transformers, f"{kind}Config")(**options)
    net = getattr(transformers, f"{kind}{head}")(config).eval()
    with torch.no_grad():  # fresh norms are constants, which a file has for nothing
        for value in net.parameters():
            if value.dim() == 1:
                value.add_(0.1 * torch.randn_like(value))
    return net


def zipf(count=12, length=16, seed=1):
    """Tokens as text has them: few of them often, a third of them never."""
    shares = 1 / torch.arange(1, V + 1).float()
    shares[2 * V // 3 :] = 0
    return torch.multinomial(
        shares, count * length, replacement=True, generator=torch.Generator().manual_seed(seed)
    ).view(count, length)


def names(network):
    return {row.name for row in size_report(network).tensors}


@torch.no_grad()
def lost(net, other, x):
    """Mean divergence of what is said, nats a token."""
    said, now = (each(input_ids=x).logits.log_softmax(-1) for each in (net, other))
    return float((said.exp() * (said - now)).sum(-1).mean())


class TestWhich:
    @pytest.mark.parametrize(
        ("kind", "head", "tied", "expected"),
        [
            ("Llama", "ForCausalLM", True, ("model.embed_tokens", "lm_head", None)),
            ("Llama", "ForCausalLM", False, ("model.embed_tokens", None, "lm_head")),
            ("Qwen2", "ForSequenceClassification", False, ("model.embed_tokens", None, None)),
            ("Bert", "Model", True, ("embeddings.word_embeddings", None, None)),
            (
                "Bert",
                "ForMaskedLM",
                True,
                ("bert.embeddings.word_embeddings", "cls.predictions.decoder", None),
            ),
        ],
    )
    def test_by_network(self, kind, head, tied, expected):
        found = vocabulary_of(make(kind, head, tied), BlockwiseRecipe())
        assert (found.embedding, found.tied_head, found.head) == expected

    def test_by_recipe(self):
        tied, own = make(), make(tied=False)
        assert vocabulary_of(tied, BlockwiseRecipe(embedding=False)).paths == []
        assert vocabulary_of(tied, BlockwiseRecipe(head=False)).paths == ["model.embed_tokens"]
        assert vocabulary_of(own, BlockwiseRecipe(embedding=False)).paths == ["lm_head"]
        assert vocabulary_of(own, BlockwiseRecipe(head=False)).paths == ["model.embed_tokens"]
        left = BlockwiseRecipe(layers={"lm_head": {"skip": True}})
        assert vocabulary_of(own, left).without_skipped(left).paths == ["model.embed_tokens"]
        assert vocabulary_of(tied, left).tied_head == "lm_head"  # the embedding, by the name it has

    def test_an_embedding_that_computes_more_than_a_look_up(self):
        class Scaled(nn.Embedding):
            def forward(self, x):
                return 2 * super().forward(x)

        net = make(tied=False)
        net.model.embed_tokens = Scaled(V, 32)
        found = compress_transformer(net, zipf(), RECIPE)
        assert [record.name for record in found.vocabulary] == ["lm_head"]
        with pytest.raises(RecipeError, match=r"embedding' is true, but 'model\.embed_tokens' is a Scaled, "):
            compress_transformer(net, zipf(), {**RECIPE, "embedding": True})
        net.lm_head.weight = net.model.embed_tokens.weight
        assert vocabulary_of(net, BlockwiseRecipe()).paths == []

    @pytest.mark.parametrize(
        ("case", "keys", "sentence"),
        [
            ("t5", {"embedding": True}, "embedding' is true, but architecture 't5' has several stacks"),
            ("clip", {"head": True}, "head' is true, but architecture 'clip' has several stacks"),
            ("vit", {"head": True}, "ViTForImageClassification has no head with a row for each token"),
            ("gpt2", {"embedding": False, "head": True}, r"'lm_head' is tied to the embedding, which is left"),
        ],
    )
    def test_what_cannot_be_is_left_and_refused_if_asked_for(self, case, keys, sentence):
        net = architectures.make(case)
        left = BlockwiseRecipe(**{key: False for key, asked in keys.items() if not asked})
        assert vocabulary_of(net, left) == Vocabulary()
        with pytest.raises(RecipeError, match=sentence):
            vocabulary_of(net, BlockwiseRecipe(**keys))

    def test_the_last_parameter_is_left(self):
        net = architectures.make("olmo")  # norms without weights
        assert vocabulary_of(net, BlockwiseRecipe()).paths == ["lm_head"]
        with pytest.raises(RecipeError, match=r"without 'model\.embed_tokens' no parameter is left"):
            vocabulary_of(net, BlockwiseRecipe(embedding=True))
        assert vocabulary_of(net, BlockwiseRecipe(embedding=True, head=False)).paths == ["model.embed_tokens"]

    def test_an_embedding_that_is_not_read_is_refused(self):
        net = make()
        x = torch.randn(4, 8, 32)
        with pytest.raises(NetworkError, match=r"reads nothing from its embedding 'model\.embed_tokens'"):
            compress_transformer(net, {"inputs_embeds": x}, RECIPE)

    def test_tokens_are_counted_and_rows_exchanged(self):
        table = nn.Embedding(4, 2)
        with counted_tokens(table) as counts:
            table(torch.tensor([[1, 1], [3, 1]]))
        assert counts.tolist() == [0, 3, 0, 1]
        with rows_of(table, torch.ones(4, 2)):
            assert table(torch.tensor([2])).tolist() == [[1, 1]]
        assert torch.equal(table(torch.tensor([2])), table.weight[2:3])


@pytest.mark.parametrize("case", ["llama", "bert", "opt", "falcon", "bloom", "gpt2"])
@torch.no_grad()
def test_what_reaches_the_head_is_what_the_network_gives_it(case):
    net, seen = architectures.make(case), []
    module = net.get_submodule(vocabulary_paths(net)[1])
    hook = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    inputs = architectures.inputs(net, count=2)
    net(**inputs)
    hook.remove()
    stack = BlockStack(net, blocks(net), stepped_over=architecture_of(net).bare)
    entrance = stack.entrance(inputs)
    hidden = entrance.hidden
    for block, arguments in zip(stack.blocks, entrance.arguments, strict=True):
        hidden = run_block(block, hidden, arguments)
    torch.testing.assert_close(stack.exit_input(inputs, hidden, module), seen[0])
    with pytest.raises(NetworkError, match="does not call its Linear"):
        stack.exit_input(inputs, hidden, nn.Linear(2, 2))


class TestOutcome:
    @pytest.mark.parametrize("allocation", ["importance", "even"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_bits_count_all_weights(self, allocation, tied, tmp_path):
        net = make(tied=tied)
        result = compress_transformer(net, zipf(), {**RECIPE, "bits": 2.5, "allocation": allocation})
        save(result.network, tmp_path / "net")
        report, loaded = size_report(tmp_path / "net"), load(tmp_path / "net", net)
        matrices = {name for name, value in net.named_parameters() if value.dim() == 2}
        assert {row.name for row in report.tensors} == matrices and not result.findings
        assert report.bits_per_weight == pytest.approx(2.5, abs=0.15)
        assert [record.name for record in result.vocabulary] == ["model.embed_tokens", "lm_head"][: 2 - tied]
        with torch.no_grad():
            first, second = (each(input_ids=zipf()).logits for each in (result.network, loaded))
        assert torch.equal(first, second)
        assert loaded.model.embed_tokens.packed_weight is not None
        shared = loaded.lm_head.packed_weight is loaded.model.embed_tokens.packed_weight
        assert shared == tied and len(stored_weights(loaded)) == len(matrices)

    def test_without_them_nothing_has_changed(self):
        keys = {**RECIPE, "embedding": False, "head": False}
        net = make(tied=False)
        result = compress_transformer(net, zipf(), keys)
        assert all("proj" in name for name in names(result.network)) and not result.vocabulary
        assert torch.equal(result.network.lm_head.weight, net.lm_head.weight.half().float())

    @pytest.mark.parametrize("tied", [True, False])
    def test_beats_rounding_to_an_even_grid_at_equal_entropy(self, tied):
        net, other = make(tied=tied), zipf(seed=5)
        result = compress_transformer(net, zipf(48), {**RECIPE, **ONLY_TABLES, "bits": 2.0})
        rounded = copy.deepcopy(net)
        with torch.no_grad():
            for row in size_report(result.network).tensors:
                weight = rounded.get_parameter(row.name)
                weight.copy_(rounded_to(8 * row.bytes / row.numel, weight))
        assert lost(net, result.network, other) < 0.9 * lost(net, rounded, other)

    def test_rows_that_are_read_are_finer(self):
        net, x = make("Llama", "Model"), zipf(24)
        result = compress_transformer(net, x, {**RECIPE, "bits": 2.0, "layers": {"layers.*": {"skip": True}}})
        before, after = net.embed_tokens.weight.detach(), result.network.embed_tokens.weight
        error = (after - before).square().mean(1)
        read = torch.bincount(x.view(-1), minlength=V)
        assert float(error[read > 8].mean()) < 0.5 * float(error[read == 0].mean())
        # Rows that were never read are coarse, not gone.
        unseen = before[read == 0]
        assert float((after - before)[read == 0].norm() / unseen.norm()) < 0.8

    def test_blocks_see_the_rows_that_ship(self, monkeypatch):
        net, seen = make(tied=False), []
        real = one_block.input_moments

        def noted(pairs, shares):
            pairs = list(pairs)
            seen.append(pairs[0])
            return real(iter(pairs), shares)

        monkeypatch.setattr(one_block, "input_moments", noted)
        result = compress_transformer(net, zipf(), {**RECIPE, "allocation": "even", "batch_size": 12})
        with torch.no_grad():
            rows = result.network.model.embed_tokens(zipf())
            expected = net.model.layers[0].input_layernorm(rows)
        before, after = seen[0]
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
        assert not torch.equal(before, after)

    def test_bits_of_their_own(self):
        own = {"model.embed_tokens": {"bits": 3.5}, "lm_head": {"bits": 2.0}, "model.layers.*": {"skip": True}}
        result = compress_transformer(make(tied=False), zipf(), {**RECIPE, "layers": own})
        assert [record.bits for record in result.vocabulary] == pytest.approx([3.5, 2.0], abs=0.1)

    def test_the_printed_result_has_them(self):
        result = compress_transformer(make(), zipf(), {**RECIPE, **ONLY_TABLES})
        assert "model.embed_tokens" in str(result)


class TestMegabytes:
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("allocation", ["importance", "even"])
    def test_are_met(self, tied, allocation, tmp_path):
        net = make(tied=tied, width=64, depth=2, vocab_size=512, intermediate_size=128)
        asked = 0.04 if tied else 0.048
        recipe = {**RECIPE, "bits": None, "megabytes": asked, "allocation": allocation}
        save(compress_transformer(net, zipf(), recipe).network, tmp_path / "net")
        assert (tmp_path / "net").stat().st_size == pytest.approx(1e6 * asked, rel=0.01)

    @pytest.mark.parametrize(
        ("keys", "sentence"),
        [
            ({"megabytes": 0.0001}, r"megabytes' is 0\.0001, which comes to -.*: give 0\.\d+ to 0\.\d+"),
            ({"megabytes": 1}, r"megabytes' is 1, which comes to \d+"),
            ({"megabytes": 0.02, "layers": {"*": {"bits": 3}}}, "every layer has bits of its own"),
            ({"megabytes": 0.02, "bits": 3}, "one of bits, .* and megabytes, .* 3.0 and 0.02: leave out one"),
            ({"bits": None}, "they are None and None"),
        ],
    )
    def test_that_cannot_be_had_are_refused_before_any_work(self, keys, sentence, tmp_path):
        recipe = {key: value for key, value in RECIPE.items() if key != "bits"} | keys
        with pytest.raises(RecipeError, match=sentence):
            compress_transformer(make(), zipf(), recipe, directory=tmp_path / "blocks")
        assert not (tmp_path / "blocks").exists()


def _killed(part, directory):
    torch.set_num_threads(1)
    write = BlockStore.write_table

    def die(self, name, table):
        if name == part:  # compressed, but not yet kept
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, name, table)

    BlockStore.write_table = die
    compress_transformer(make(tied=False), zipf(), RECIPE, directory=directory)


class TestInterruption:
    @pytest.mark.parametrize(
        ("part", "left"),
        [
            pytest.param("embedding", ["plan.pt"], marks=pytest.mark.slow),
            pytest.param("head", ["block-000.pt", "embedding.pt", "plan.pt"], marks=pytest.mark.slow),
        ],
    )
    def test_killed_and_resumed(self, part, left, tmp_path):
        script = "import sys; from compression.blockwise.test_vocabulary import _killed as run; run(*sys.argv[1:])"
        blocks = tmp_path / "blocks"
        killed = forks.run(script, part, blocks, imported=forks.LIBRARY)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert sorted(path.name for path in blocks.glob("*.pt")) == left
        for name, directory in (("resumed", blocks), ("whole", None), ("kept", blocks)):
            found = compress_transformer(make(tied=False), zipf(), RECIPE, directory=directory)
            save(found.network, tmp_path / name)
        whole = (tmp_path / "whole").read_bytes()
        assert (tmp_path / "resumed").read_bytes() == (tmp_path / "kept").read_bytes() == whole

    @pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
    def test_a_checkpoint_whose_weights_changed_is_refused(self, name, tmp_path):
        net, recipe = make(tied=False), {**RECIPE, **ONLY_TABLES, "allocation": "even"}
        compress_transformer(net, zipf(), recipe, directory=tmp_path)
        with torch.no_grad():
            net.get_submodule(name).weight[0, 0] += 1
        sentence = rf"embedding\.pt' was made of another network \('{name}\.weight' has other values\)"
        with pytest.raises(NetworkError, match=sentence):
            compress_transformer(net, zipf(), recipe, directory=tmp_path)
