"""Tables of names against networks built by transformers from tiny random configurations."""

import re
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from kits import architectures as kit
from kits import forks
from kits.architectures import make as make_case
from pyro.infer import SVI
from pyro.optim import Adam
from torch import nn

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeGMMGuide
from sqs_pyro.errors import NetworkError
from sqs_pyro.networks import architectures
from sqs_pyro.networks.architectures import (
    Architecture,
    architecture_names,
    architecture_of,
    block_paths,
    blocks,
    include_patterns,
    layer_groups,
    linear_layers,
    parts_of,
    register_architecture,
)
from sqs_pyro.networks.block_stack import BlockStack, run_block
from sqs_pyro.networks.linear_form import every_token_to_every_expert, in_linear_form

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CAUSAL = {"num_key_value_heads": 2, "pad_token_id": 0}
CONFIGS = {
    "bert": lambda **more: transformers.BertConfig(**TINY, **more),
    "llama": lambda **more: transformers.LlamaConfig(**TINY, **CAUSAL, **more),
    "mistral": lambda **more: transformers.MistralConfig(**TINY, **CAUSAL, **more),
    "qwen2": lambda **more: transformers.Qwen2Config(**TINY, **CAUSAL, **more),
    "qwen3": lambda **more: transformers.Qwen3Config(**TINY, **CAUSAL, head_dim=16, **more),
}
#: Heads of each family, with the linear layers outside the blocks, which one part or another has to find.
CAUSAL_HEADS = {
    "Model": set(),
    "ForCausalLM": {"lm_head"},
    "ForSequenceClassification": {"score"},
    "ForTokenClassification": {"score"},
    "ForQuestionAnswering": {"qa_outputs"},
}
MASKED_HEAD = {"cls.predictions.transform.dense", "cls.predictions.decoder"}
BERT_HEADS = {
    "Model": {"pooler.dense"},
    "ForSequenceClassification": {"bert.pooler.dense", "classifier"},
    "ForTokenClassification": {"classifier"},
    "ForQuestionAnswering": {"qa_outputs"},
    "ForMultipleChoice": {"bert.pooler.dense", "classifier"},
    "ForMaskedLM": MASKED_HEAD,
    "ForPreTraining": {"bert.pooler.dense", "cls.seq_relationship"} | MASKED_HEAD,
    "ForNextSentencePrediction": {"bert.pooler.dense", "cls.seq_relationship"},
}
HEADS = [
    (name, head)
    for name, heads in {"bert": BERT_HEADS, **dict.fromkeys(CONFIGS.keys() - {"bert"}, CAUSAL_HEADS)}.items()
    for head in sorted(heads)
]
HEADS.sort()


def make(name: str, head: str, **more):
    return getattr(transformers, name.capitalize() + head)(CONFIGS[name](**more)).eval()


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(architectures, "_architectures", dict(architectures._architectures))


EVERY = kit.CASES


def test_every_known_architecture_is_tested():
    assert architecture_names() == sorted({make_case(case).config.model_type for case in EVERY})


#: Matrices in blocks that are no linear layers of the network, or stay as they are: routers, gates, positions.
KEPT = r"mlp\.gate\.weight|shared_expert_gate\.weight|relative_attention_bias\.weight"


class TestEveryArchitecture:
    @pytest.mark.parametrize("case", EVERY)
    def test_patterns_name_every_matrix_in_the_blocks(self, case):
        """Of the network as it is: by dimensions, without the table."""
        net = make_case(case)
        patterns = [re.compile(pattern) for pattern in include_patterns(net)]
        names = [name for name, value in net.named_parameters() if value.dim() > 1]
        inside = [name for name in names if any(name.startswith(f"{path}.") for path in block_paths(net))]
        found = [name for name in names if any(pattern.search(name) for pattern in patterns)]
        assert found == [name for name in inside if not re.search(KEPT, name)]
        assert set(BayesianNetwork(net, include=include_patterns(net)).site_values()) == {*found}
        assert {name.removesuffix(".weight") for name in found} == {*parts_of(net)["blocks"]}

    @pytest.mark.parametrize("case", EVERY)
    @torch.no_grad()
    def test_groups_share_their_input_and_stand_in_the_order_of_calls(self, case):
        """By hooks: what each layer of each block is really called with, and when."""
        net = make_case(case)
        with in_linear_form(net), every_token_to_every_expert():
            calls: dict[str, torch.Tensor] = {}
            for path in block_paths(net):
                for name in (
                    name for group in layer_groups(net.get_submodule(path), architecture_of(net)) for name in group
                ):
                    net.get_submodule(f"{path}.{name}").register_forward_pre_hook(
                        lambda m, args, path=f"{path}.{name}": calls.update({path: args[0]})
                    )
            net(**kit.inputs(net, count=2))
            position = {path: i for i, path in enumerate(calls)}
            for path in block_paths(net):
                groups = layer_groups(net.get_submodule(path), architecture_of(net))
                for group in groups:
                    inputs = [calls[f"{path}.{name}"] for name in group]
                    assert all(torch.equal(x, inputs[0]) for x in inputs)
                first = [min(position[f"{path}.{name}"] for name in group) for group in groups]
                assert first == sorted(first)


@pytest.mark.parametrize(("name", "head"), HEADS)
class TestEveryHead:
    def test_every_linear_layer_has_a_role(self, name, head):
        """Counted here by module type, without the table: none may be left out unnoticed."""
        net = make(name, head)
        architecture = architecture_of(net)
        assert architecture.name == name
        assert len(blocks(net)) == 2
        for path, block in zip(block_paths(net), blocks(net), strict=True):
            assert net.get_submodule(path) is block
            expected = {id(module) for module in block.modules() if isinstance(module, nn.Linear)}
            layers = linear_layers(block, architecture)
            assert {id(layer) for layer in layers.values()} == expected
            assert len(layers) == len(expected) == (6 if name == "bert" else 7)

    def test_parts_and_patterns_cover_the_whole_network(self, name, head):
        net = make(name, head)
        parts = parts_of(net)
        inside = {f"{path}.{layer}" for path in block_paths(net) for layer in architecture_of(net).layers.values()}
        assert set(parts["blocks"]) == inside
        linear = {path for path, module in net.named_modules() if isinstance(module, nn.Linear)}
        assert linear - inside == (BERT_HEADS if name == "bert" else CAUSAL_HEADS)[head]
        assert {path for paths in parts.values() for path in paths} == linear | set(parts["embedding"])
        for part, paths in parts.items():
            patterns = include_patterns(net, [part])
            found = {
                n
                for n, _ in net.named_parameters(remove_duplicate=False)
                if any(re.search(p, n) for p in patterns)
            }
            assert found == {f"{path}.weight" for path in paths}


ORDER = {
    "bert": [["q", "k", "v"], ["o"], ["intermediate"], ["output"]],
    "llama": [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]],
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
@torch.no_grad()
def test_groups_share_their_input_and_stand_in_the_order_of_calls(name):
    """By hooks: what each layer is really called with, and when."""
    net = make(name, "Model")
    architecture, block = architecture_of(net), blocks(net)[0]
    assert [list(group) for group in architecture.groups] == ORDER.get(name, ORDER["llama"])
    calls: dict[str, torch.Tensor] = {}
    for path in architecture.layers.values():
        block.get_submodule(path).register_forward_pre_hook(
            lambda m, args, path=path: calls.update({path: args[0]})
        )
    entrance = BlockStack(net, blocks(net)).entrance({"input_ids": torch.randint(0, 64, (2, 5))})
    run_block(block, entrance.hidden, entrance.arguments[0])

    groups = layer_groups(block, architecture)
    position = {path: i for i, path in enumerate(calls)}
    for i, group in enumerate(groups):
        assert all(block.get_submodule(path) is layer for path, layer in group.items())
        inputs = [calls[path] for path in group]
        assert all(torch.equal(x, inputs[0]) for x in inputs)
        if i:
            assert min(map(position.get, group)) > max(map(position.get, groups[i - 1]))
            before = calls[next(iter(groups[i - 1]))]
            assert before.shape != inputs[0].shape or not torch.equal(before, inputs[0])


# Bayesian ---------------------------------------------------------------------------------------------


LIKELIHOODS = {
    "Model": lambda output: dist.Normal(output.last_hidden_state, 1.0).to_event(2),
    "ForQuestionAnswering": lambda output: dist.Categorical(
        logits=torch.stack([output.start_logits, output.end_logits], 1)  # [B, 2, T]
    ).to_event(1),
    "ForPreTraining": lambda output: dist.Categorical(logits=output.seq_relationship_logits),
}


@pytest.mark.parametrize(("name", "head"), HEADS)
def test_a_step_of_svi(name, head):
    net = make(name, head)
    parts = [part for part in parts_of(net) if part in ("blocks", "classifier")]
    likelihood = LIKELIHOODS.get(head, "categorical")
    model = BayesianNetwork(net, num_data=10, include=include_patterns(net, parts), likelihood=likelihood)
    sites = len(model.site_values())
    assert sites == 2 * (6 if name == "bert" else 7) + sum(len(parts_of(net)[part]) for part in parts[1:])
    guide = SpikeGMMGuide(model, num_components=3, estimator="straight_through")
    svi = SVI(model, guide, Adam({"lr": 1e-3}), loss=SQSELBO())
    shape = (2, 2, 5) if head == "ForMultipleChoice" else (2, 5)
    inputs = {"input_ids": torch.randint(1, 64, shape)}
    with torch.no_grad():
        y = model.likelihood(net(**inputs)).sample()
    assert torch.isfinite(torch.tensor(svi.step(inputs, y)))


# Tied embeddings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "head", "embedding"),
    [
        ("llama", "ForCausalLM", "model.embed_tokens.weight"),
        ("qwen2", "ForCausalLM", "model.embed_tokens.weight"),
        ("bert", "ForMaskedLM", "bert.embeddings.word_embeddings.weight"),
    ],
)
def test_a_tied_head_is_one_site_with_its_embedding(name, head, embedding):
    net = make(name, head, tie_word_embeddings=True)
    both = BayesianNetwork(net, include=include_patterns(net, ["blocks", "embedding", "head"]))
    names = list(both.site_values())
    assert names.count(embedding) == 1
    assert not any("lm_head" in other or "decoder" in other for other in names)
    by_head = BayesianNetwork(net, include=include_patterns(net, ["blocks", "head"]))
    assert list(by_head.site_values()) == names
    assert embedding not in BayesianNetwork(net, include=include_patterns(net)).site_values()


def test_a_draw_of_a_tied_site_reaches_both_ends():
    """A point mass at zero: every hidden state and, through the head, every logit is then zero."""
    net = make("llama", "ForCausalLM", tie_word_embeddings=True)
    zero = {"model.embed_tokens.weight": torch.zeros(64, 32)}
    model = BayesianNetwork(net, include=include_patterns(net, ["embedding"]))
    trace = pyro.poutine.trace(pyro.poutine.condition(model, zero)).get_trace(
        {"input_ids": torch.tensor([[1, 2]])}
    )
    assert torch.equal(trace.nodes["logits"]["value"], torch.zeros(1, 2, 64))


def test_an_untied_head_is_a_site_of_its_own():
    net = make("llama", "ForCausalLM", tie_word_embeddings=False)
    names = BayesianNetwork(net, include=include_patterns(net, ["embedding", "head"])).site_values()
    assert list(names) == ["model.embed_tokens.weight", "lm_head.weight"]


# A user's own -----------------------------------------------------------------------------------------


class Config:
    model_type = "own"


class Own(nn.Module):
    """No transformers model: a ``config.model_type`` is enough."""

    def __init__(self):
        super().__init__()
        self.config = Config()
        self.stages = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}) for _ in range(11))
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        for stage in self.stages:
            x = x + stage["b"](torch.relu(stage["a"](x)))
        return self.head(x)


OWN = Architecture("own", "stages", ({"up": "a"}, {"down": "b"}), {"head": ("head",)})


def test_a_users_own_architecture(registry):
    register_architecture(OWN)
    net = Own()
    assert architecture_of(net) is OWN is architecture_of(Config())
    assert block_paths(net)[-1] == "stages.10"
    assert list(linear_layers(blocks(net)[3], OWN)) == ["up", "down"]
    model = BayesianNetwork(net, include=include_patterns(net, ["blocks", "head"]))
    assert len(model.site_values()) == 23
    groups = partial(layer_groups, architecture=OWN)
    assert [list(group) for group in groups(net.stages[0])] == [["a"], ["b"]]


def test_registering_twice(registry):
    register_architecture(OWN)
    same = Architecture("own", "stages", ({"up": "a"}, {"down": "b"}), {"head": ("head",)})
    assert register_architecture(same) == OWN
    other = Architecture("own", "stages", ({"up": "a"},))
    with pytest.raises(NetworkError, match="'own' is known already, with other names in it: give override=True"):
        register_architecture(other)
    register_architecture(other, override=True)
    assert architecture_of(Config()) is other


class TestSaysWhatIsWrong:
    def test_unknown(self):
        with pytest.raises(
            NetworkError, match=r"'own' of this Own is unknown: known are bert, bloom.*register_arch"
        ):
            blocks(Own())
        with pytest.raises(NetworkError, match="Linear has no model_type: known are bert"):
            architecture_of(nn.Linear(1, 1))

    def test_a_layer_without_a_role(self, registry):
        register_architecture(Architecture("own", "stages", ({"up": "a"},)))
        net = Own()
        with pytest.raises(
            NetworkError, match=r"ModuleDict has linear layers to which .* 'own' gives no role: b; reg"
        ):
            linear_layers(blocks(net)[0], architecture_of(net))

    def test_cross_attention_has_no_role(self):
        """A BERT decoder's blocks have more layers than the table names."""
        net = make("bert", "Model", is_decoder=True, add_cross_attention=True)
        with pytest.raises(NetworkError, match=r"gives no role: crossattention\.output\.dense"):
            linear_layers(blocks(net)[0], architecture_of(net))
        with pytest.raises(NetworkError, match=r"gives no role: crossattention\.output\.dense"):
            include_patterns(net)

    def test_a_role_without_a_layer(self):
        net = make("llama", "Model")
        with pytest.raises(NetworkError, match=r"has nothing at 'attention.self.query', but .* 'bert' .*\('q'\)"):
            linear_layers(blocks(net)[0], architecture_of(CONFIGS["bert"]()))

    def test_no_blocks_there(self, registry):
        register_architecture(Architecture("own", "layers", ({"up": "a"},)))
        with pytest.raises(NetworkError, match="Own has no list of blocks at 'layers'"):
            blocks(Own())

    def test_parts(self):
        net = make("bert", "Model")
        with pytest.raises(
            NetworkError, match="BertModel has no part 'classifier': it has blocks, embedding, pooler"
        ):
            include_patterns(net, ["blocks", "classifier"])
        with pytest.raises(NetworkError, match="no part to include: name some of blocks, embedding, pooler"):
            include_patterns(net, [])
        assert include_patterns(net, "blocks") == include_patterns(net)

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ({"groups": ()}, "has a group without a layer, or no group"),
            ({"groups": ({"q": "a"}, {})}, "has a group without a layer"),
            ({"groups": ({"q": "a"}, {"q": "b"})}, "names 'q' twice"),
            ({"groups": ({"q": "a", "k": "a"},)}, "names 'a' twice"),
            (
                {"groups": ({"q": "a"},), "parts": {"blocks": ("x",)}},
                "has a part .blocks., which its groups are already",
            ),
        ],
    )
    def test_impossible_tables(self, arguments, sentence):
        with pytest.raises(NetworkError, match=f"'mine' {sentence}"):
            Architecture(name="mine", blocks="layers", **arguments)


def test_transformers_is_not_imported():
    code = "import sys, sqs_pyro.networks.architectures; assert 'transformers' not in sys.modules"
    assert forks.run(code).returncode == 0
