"""Text by a compiled step: the tokens of transformers' own `generate`, from code that is compiled once."""

import pytest
import torch
from kits.tiny_transformers import packed_tiny, tiny

transformers = pytest.importorskip("transformers")

from sqs_pyro.errors import NetworkError  # noqa: E402
from sqs_pyro.exporting import decoding  # noqa: E402
from sqs_pyro.exporting.cached_attention import reading_what_is_seen  # noqa: E402
from sqs_pyro.exporting.decoding import can_be_compiled, decode_compiled, static_cache  # noqa: E402
from sqs_pyro.kernels.native import has_native_kernel  # noqa: E402

PROMPT = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture(scope="module")
def compiler_cache(tmp_path_factory):
    """A directory that holds what the first of these tests compiles."""
    directory = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SQS_CACHE", str(directory))
        yield directory


def said(net, seed=0, **options):
    torch.manual_seed(seed)
    return net.generate(PROMPT, max_new_tokens=12, min_new_tokens=12, pad_token_id=0, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_tokens_are_those_of_generate(name, compiler_cache, monkeypatch):
    net = packed_tiny(name)
    for options in ({}, {"do_sample": True, "temperature": 2.0}, {"repetition_penalty": 1.5}):
        assert torch.equal(said(net, **options, custom_generate=decode_compiled), said(net, **options))
        monkeypatch.setattr(decoding, "_compile", None)  # once is enough
    assert len(list(compiler_cache.glob("decoding-*.pt2"))) >= 1
    # Other weights of these shapes are taken by the same code.
    other = packed_tiny(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
    drawn = {"do_sample": True, "temperature": 2.0}
    found = said(other, **drawn, custom_generate=decode_compiled)
    assert torch.equal(found, said(other, **drawn)) and not torch.equal(found, said(net, **drawn))


@pytest.mark.slow
def test_logits_are_those_of_a_call(compiler_cache):
    net = packed_tiny("llama")
    cache = static_cache(net, 8)
    with torch.inference_mode():
        net(input_ids=PROMPT, cache=cache, use_cache=True)
        step, seen = decoding.compiled_step(net, cache), PROMPT
        for token in (7, 2):
            seen = torch.cat([seen, torch.tensor([[token]])], 1)
            torch.testing.assert_close(step(seen[:, -1:]), net(input_ids=seen).logits[:, -1])


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_reading_what_is_seen_changes_no_logits(name):
    net = tiny(name).eval()
    cache = static_cache(net, 8)
    with torch.inference_mode():
        net(input_ids=PROMPT, cache=cache, use_cache=True)
        seen = torch.cat([PROMPT, torch.tensor([[7]])], 1)
        expected = net(input_ids=seen).logits[:, -1:]
        with reading_what_is_seen(net), torch.profiler.profile() as profile:
            found = net(input_ids=seen[:, -1:], cache=cache, use_cache=True).logits
    torch.testing.assert_close(found, expected)
    ours = [event.count for event in profile.key_averages() if event.key == "sqs::cached_attention"]
    assert ours == [net.config.num_hidden_layers] or not has_native_kernel("cached_attention")
    assert net.config._attn_implementation == "sdpa"


def test_the_step_is_of_a_network_wherever_it_lies_and_of_no_other():
    def key(net):
        cache = static_cache(net, 8)
        net(input_ids=PROMPT, cache=cache, use_cache=True)
        return decoding._key(decoding._Step(net, cache))

    net = packed_tiny("llama")
    first = key(net)
    net.config._name_or_path = "elsewhere"
    assert key(net) == first
    assert first not in (
        key(packed_tiny("llama", exclude=("lm_head",))),
        key(packed_tiny("llama", rms_norm_eps=0.1)),
    )


@pytest.mark.parametrize(("length", "size"), [(1, 256), (256, 256), (257, 512), (1025, 2048)])
def test_few_lengths_are_compiled(length, size):
    assert {layer.max_cache_len for layer in static_cache(tiny("llama"), length).layers} == {size}


@pytest.mark.parametrize(
    ("inputs", "options", "sentence"),
    [
        (torch.ones(2, 3, dtype=torch.int64), {}, "decodes one text without padding, but got 2"),
        (PROMPT, {"attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}, "decodes one text without padding"),
        (PROMPT, {"num_beams": 2}, "gives one sequence of tokens, no beams or scores"),
        (PROMPT, {"return_dict_in_generate": True}, "gives one sequence of tokens, no beams or scores"),
    ],
)
def test_what_is_refused(inputs, options, sentence):
    with pytest.raises(NetworkError, match=sentence):
        tiny("llama").generate(
            inputs, max_new_tokens=2, pad_token_id=0, custom_generate=decode_compiled, **options
        )


def test_sliding_windows_are_refused():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MistralConfig(vocab_size=64, intermediate_size=48, sliding_window=4, **sizes)
    net = transformers.MistralForCausalLM(config).eval()
    assert can_be_compiled(tiny("llama")) and not can_be_compiled(net)
    with pytest.raises(NetworkError, match="MistralForCausalLM has sliding windows"):
        net.generate(PROMPT, max_new_tokens=2, pad_token_id=0, custom_generate=decode_compiled)
