"""The last steps: everything without a code learns together, is kept on its way, and is taken only if it helps."""

import os
import signal
from contextlib import contextmanager

import pytest
import torch
from kits import forks
from kits.tiny_transformers import tiny

from sqs_pyro import compress_transformer, save
from sqs_pyro.compression.blockwise.one_block import BlockCoder
from sqs_pyro.errors import RecipeError
from sqs_pyro.packing.stored import stored_weights

# Blocks that make up for nothing leave something to do.
RECIPE = {"bits": 1.2, "batch_size": 16, "importance_sequences": 8, "adapt_inputs": False, "damping": 10.0}
FAST = {**RECIPE, "codebook_learning_rate": 1e-2, "leftover_learning_rate": 1e-2}


def network(name="llama"):
    torch.manual_seed(0)
    net = tiny(name)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:  # of random weights this small nothing would depend on the input
                parameter.mul_(8)
    return net


@contextmanager
def scales_everywhere():
    """Scales in every layer of the blocks: in layers this small they are not worth their bits."""
    with pytest.MonkeyPatch.context() as patch:
        some = lambda weight, *_, **__: torch.linspace(0.5, 2.0, len(weight)).half().float()  # noqa: E731
        patch.setattr("sqs_pyro.compression.blockwise.block_layers.scales_of", some)
        yield


@pytest.fixture(scope="module", autouse=True)
def scales():
    with scales_everywhere():
        yield


@pytest.fixture(scope="module")
def net():
    return network()


@pytest.fixture(scope="module")
def sequences():
    return torch.randint(3, 64, (160, 12), generator=torch.Generator().manual_seed(0))


def divergence(net, packed, sequences):
    with torch.no_grad():
        p, q = (each(sequences).logits.log_softmax(-1) for each in (net, packed))
        return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def finished(net, sequences, tmp_path_factory):
    """A network with 40 last steps, and the directory of its blocks."""
    directory = tmp_path_factory.mktemp("finished")
    result = compress_transformer(net, sequences, {**FAST, "finish_steps": 40}, directory=directory)
    save(result.network, directory / "packed.safetensors")
    return result, directory


def test_codes_stay_and_the_networks_come_nearer(net, sequences, finished, monkeypatch):
    result, directory = finished
    # Other steps, and none, go on behind the same blocks.
    monkeypatch.setattr(BlockCoder, "compress", None)
    plain = compress_transformer(net, sequences, FAST, directory=directory)
    assert plain.finish is None and result.finish.steps == 40 and not result.findings
    before, after = (
        {name: weight.coded() for name, weight in stored_weights(each.network).items()} for each in (plain, result)
    )
    moved = 0
    for name, a in before.items():
        b = after[name]
        assert torch.equal(a.codes, b.codes) and torch.equal(a.mask, b.mask)
        if name.startswith("model.layers"):
            moved += not torch.equal(a.codebook, b.codebook) and not torch.equal(a.scales, b.scales)
        else:
            assert torch.equal(a.codebook, b.codebook)
    assert moved > 10  # of 14 layers, some of which have only zeros behind them
    changed = [
        name
        for name, value in result.network.named_parameters()
        if not torch.equal(value, plain.network.get_parameter(name))
    ]
    assert "model.norm.weight" in changed and "model.layers.1.input_layernorm.weight" in changed
    unseen = torch.randint(3, 64, (64, 12), generator=torch.Generator().manual_seed(9))
    assert divergence(net, result.network, unseen) < divergence(net, plain.network, unseen)
    assert result.finish.after < result.finish.before
    assert "40 last steps: from" in str(result) and "last steps" not in str(plain)
    # As it ships: the record is the packed network's, of sequences that were not learned from.
    judged = torch.cat([part for i, part in enumerate(sequences.split(2), 1) if i % 20 == 0])
    assert 12 * divergence(net, result.network, judged) == pytest.approx(result.finish.after, rel=1e-3)


def test_interrupted_steps_go_on_and_end_in_the_same_bytes(net, sequences, finished, tmp_path):
    recipe, done = {**FAST, "finish_steps": 40}, []

    def interrupt(step, steps, nats):
        done.append(step)
        if step == 27:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_transformer(net, sequences, recipe, directory=tmp_path, finishing=interrupt)
    result = compress_transformer(
        net, sequences, recipe, directory=tmp_path, finishing=lambda step, *_: done.append(step)
    )
    assert done == [*range(1, 28), *range(21, 41)]  # what is lost is behind the last state that was kept
    save(result.network, tmp_path / "packed.safetensors")
    expected = finished[1] / "packed.safetensors"
    assert (tmp_path / "packed.safetensors").read_bytes() == expected.read_bytes()


def killed(directory):
    """Kill this process between two of the states that are kept."""
    torch.set_num_threads(1)
    sequences = torch.randint(3, 64, (160, 12), generator=torch.Generator().manual_seed(0))

    def die(step, steps, nats):
        if step == 27:
            os.kill(os.getpid(), signal.SIGKILL)

    with scales_everywhere():
        compress_transformer(
            network(), sequences, {**FAST, "finish_steps": 40}, directory=directory, finishing=die
        )


@pytest.mark.slow
def test_killed_steps_go_on_and_end_in_the_same_bytes(net, sequences, tmp_path):
    script = "import sys; from compression.blockwise.test_finishing import killed; killed(sys.argv[1])"
    found = forks.run(script, tmp_path / "blocks", imported=forks.LIBRARY)
    assert found.returncode == -signal.SIGKILL, found.stderr
    done = []
    for name, directory in (("resumed", tmp_path / "blocks"), ("whole", None)):
        result = compress_transformer(
            net,
            sequences,
            {**FAST, "finish_steps": 40},
            directory=directory,
            finishing=lambda step, *_: done.append(step),
        )
        save(result.network, tmp_path / name)
    assert done == [*range(21, 41), *range(1, 41)]
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_steps_that_do_not_help_are_not_taken(net, sequences, tmp_path):
    reckless = {**RECIPE, "codebook_learning_rate": 3.0, "leftover_learning_rate": 3.0}
    found = [
        compress_transformer(net, sequences[:8], {**reckless, "finish_steps": steps}, directory=tmp_path)
        for steps in (0, 5)
    ]
    (said,) = found[1].findings
    assert said.kind == "not_finished" and "The last 5 steps of SVI were not taken" in said.sentence
    assert found[1].finish is None
    for a, b in zip(*(result.network.state_dict().values() for result in found), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "t5"))]
)
def test_networks_of_other_kinds(name, sequences):
    inputs = {"input_ids": sequences[:32]}
    if name == "t5":
        inputs["decoder_input_ids"] = sequences[32:64, :5]
    result = compress_transformer(network(name), inputs, {**FAST, "finish_steps": 3})
    assert result.finish is not None or [each.kind for each in result.findings].count("not_finished") == 1


def test_streamed_weights_are_refused(net, sequences):
    with pytest.raises(RecipeError, match="finish_steps: 0 beside streamed: true, but it is 5"):
        compress_transformer(net, sequences, {"streamed": True, "allocation": "even", "finish_steps": 5})
