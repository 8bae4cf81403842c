"""Calls leave process, thread and networks as they found them, and do not depend on how they found them."""

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pyro
import pytest
import torch
from kits.ambient import AMBIENT, float64
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sqs_pyro import compress, diagnose, elbo_report, load, pack, pack_ensemble, save, size_report
from sqs_pyro.compression.baseline import BaselineRecipe, train_baseline
from sqs_pyro.errors import RecipeError, SQSError
from sqs_pyro.evaluation.averaging import averaged_network, choose_temperature, evaluate_averaged
from sqs_pyro.evaluation.classification import evaluate, largest_difference
from sqs_pyro.isolation import isolated
from sqs_pyro.testing.untouched import untouched

RECIPE = {"epochs": 2, "num_components": 2, "nonzero_rate": 0.5, "batch_norm_batches": 2}


def small_network() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 2))
    net[1].eval()  # a frozen norm within a network that trains
    net[0].weight.grad = torch.ones(6, 4)
    return net


def small_data(wrong: bool = False) -> DataLoader:
    """Shuffled by the global generator, as users' are."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(24) % 2
    x = torch.randn(24, 4, generator=generator) + 3 * y[:, None]
    return DataLoader(TensorDataset(x, y + 5 * wrong), batch_size=8, shuffle=True)


def weights_of(net: nn.Module) -> dict:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def weights(result) -> dict:
    return weights_of(result.hard)


def assert_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def expected():
    return weights(compress(small_network(), small_data(), RECIPE))


@pytest.mark.parametrize("ambient", AMBIENT)
class TestCompress:
    def test_result_and_surroundings(self, ambient, expected):
        net, data = small_network(), small_data()
        with AMBIENT[ambient](), untouched(net):
            result = compress(net, data, RECIPE)
        assert_equal(weights(result), expected)
        assert not any(tensor.is_inference() for tensor in result.network.state_dict().values())
        result.network(torch.zeros(2, 4, requires_grad=True)).sum().backward()

    def test_surroundings_after_an_error(self, ambient):
        net, data = small_network(), small_data(wrong=True)
        with AMBIENT[ambient](), untouched(net), pytest.raises(SQSError):
            compress(net, data, RECIPE)

    def test_surroundings_after_ctrl_c(self, ambient):
        def interrupt(record):
            raise KeyboardInterrupt

        net, data = small_network(), small_data()
        with AMBIENT[ambient](), untouched(net), pytest.raises(KeyboardInterrupt):
            compress(net, data, RECIPE, progress=interrupt)


class TestIsolated:
    def test_a_float64_network_keeps_its_default(self):
        with float64():
            net = small_network()
            with isolated(net):
                assert torch.get_default_dtype() == torch.float64
            with isolated(small_network().float()):
                assert torch.get_default_dtype() == torch.float32

    def test_the_callers_parameters_are_seen_only_where_asked_for(self):
        pyro.param("p", torch.ones(1))
        with isolated():
            assert not list(pyro.get_param_store())
            pyro.param("q", torch.ones(1))
        with isolated(sees_parameters=True):
            assert list(pyro.get_param_store()) == ["p"]
            pyro.param("q", torch.ones(1))
        assert list(pyro.get_param_store()) == ["p"]

    def test_training_flags_of_every_module(self):
        net = small_network()
        with untouched(net), isolated(net, None):
            net.eval()

    def test_seeds_all_three(self):
        def drawn():
            return torch.rand(()).item(), random.random(), np.random.rand()  # noqa: NPY002

        with untouched():
            with isolated(seed=5):
                first = drawn()
            with isolated(seed=5):
                assert drawn() == first
            with isolated(seed=6):
                assert drawn() != first

    def test_a_block_within_a_block_does_not_wait(self):
        with untouched(), isolated(seed=1):
            expected = torch.rand(3)
            with isolated(seed=1):
                assert torch.equal(torch.rand(3), expected)

    def test_blocks_of_threads_take_turns(self):
        inside = []

        def block(i):
            with isolated(seed=i):
                assert not inside
                inside.append(i)
                drawn = torch.rand(100)
                inside.remove(i)
            return drawn

        with untouched(), ThreadPoolExecutor(8) as pool:
            drawn = list(pool.map(block, range(32)))
        for i, each in enumerate(drawn):
            assert torch.equal(each, torch.rand(100, generator=torch.Generator().manual_seed(i)))

    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
    def test_a_forked_process_does_not_wait_for_a_thread_that_it_has_not(self):
        entered, leave = threading.Event(), threading.Event()

        def hold():
            with isolated():
                entered.set()
                leave.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        entered.wait()
        try:
            child = os.fork()
            if not child:
                with isolated():
                    os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        finally:
            leave.set()
            thread.join()


class TestThreads:
    def test_compress_in_threads_gives_what_it_gives_alone(self, expected):
        net, data = small_network(), small_data()
        with untouched(net), ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _: compress(net, data, RECIPE), range(8)))
        for result in results:
            assert_equal(weights(result), expected)


@pytest.fixture(scope="module")
def result():
    return compress(small_network(), small_data(), RECIPE)


@pytest.fixture(scope="module")
def packed_file(result, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "net.safetensors"
    save(result.network, path)
    return path


def a_wrong_network() -> nn.Module:
    torch.manual_seed(7)
    return nn.Linear(3, 3)


DATA, WRONG = small_data(), small_data(wrong=True)
CALLS = {
    "evaluate": (lambda r, _, net: evaluate(net, DATA), lambda r, _, net: evaluate(net, WRONG)),
    "largest_difference": (lambda r, _, net: largest_difference(r.hard, net, DATA), None),
    "evaluate_averaged": (
        lambda r, _, net: evaluate_averaged(r.model, r.guide, DATA, 2),
        lambda r, _, net: evaluate_averaged(r.model, r.guide, WRONG, 2),
    ),
    "averaged_network": (
        lambda r, _, net: averaged_network(r.hard, r.guide, 2, seed=1)(observed()[0][0]),
        lambda r, _, net: averaged_network(r.hard, r.guide, 0),
    ),
    "choose_temperature": (
        lambda r, _, net: choose_temperature(r.hard, r.guide, DATA, (0.5, 1.0), 2),
        lambda r, _, net: choose_temperature(r.hard, r.guide, DATA, ()),
    ),
    "elbo_report": (
        lambda r, _, net: elbo_report(r.model, r.guide, *observed()[0], num_samples=2, num_particles=2),
        lambda r, _, net: elbo_report(r.model, r.guide, *observed()[0], num_samples=1),
    ),
    "diagnose": (lambda r, _, net: diagnose(r.model, r.guide), None),
    "pack": (lambda r, _, net: pack(r.guide), lambda r, _, net: pack(net)),
    "pack_ensemble": (lambda r, _, net: pack_ensemble(r, 2), lambda r, _, net: pack_ensemble(net)),
    "load": (
        lambda r, path, net: load(path, lambda: small_network()),
        lambda r, path, net: load(path, a_wrong_network),
    ),
    "save": (
        lambda r, path, net: save(r.network, path.parent / "again.safetensors"),
        lambda r, path, net: save(net, path.parent / "again.safetensors"),
    ),
    "size_report": (lambda r, _, net: size_report(r.network), lambda r, _, net: size_report(net)),
}
BASELINE = BaselineRecipe(epochs=1, learning_rate=0.01, channels_last=False)
SURROUNDINGS = ("as usual", "float64", "inference_mode", "meta device", "Pyro")


def observed():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float32, device="cpu")
    return [(x, torch.arange(8, device="cpu") % 2)]


@pytest.mark.parametrize("ambient", SURROUNDINGS)
@pytest.mark.parametrize("call", CALLS)
def test_every_call_leaves_everything_as_it_was(call, ambient, result, packed_file):
    net = small_network()
    inputs = [result.hard, result.network, result.model, result.guide, net]
    works, raises = CALLS[call]
    with AMBIENT[ambient]():
        with untouched(*inputs):
            works(result, packed_file, net)
        if raises is not None:
            with untouched(*inputs), pytest.raises(SQSError):
                raises(result, packed_file, net)


@pytest.mark.parametrize("ambient", SURROUNDINGS)
def test_training_changes_only_its_network(ambient):
    net, data, wrong = small_network(), small_data(), small_data(wrong=True)
    before = weights_of(net)
    with AMBIENT[ambient](), untouched():
        train_baseline(net, data, None, BASELINE)
        with pytest.raises(SQSError):
            train_baseline(net, wrong, None, BASELINE)
    assert not torch.equal(net[0].weight, before["0.weight"])
    again = small_network()
    train_baseline(again, data, None, BASELINE)
    with pytest.raises(SQSError):
        train_baseline(again, wrong, None, BASELINE)
    assert_equal(weights_of(again), weights_of(net))


@pytest.mark.parametrize(
    "outer", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["alone", "within"]
)
def test_autocast_inside_multiplies_with_weights_as_they_are(outer):
    layer = nn.Linear(2, 1, bias=False)
    with outer():
        enabled = torch.is_autocast_enabled("cpu")
        with isolated():
            assert layer(torch.ones(1, 2)).dtype == torch.float32
            for value in (1.0, 2.0):  # a training step lies between them
                torch.nn.init.constant_(layer.weight, value)
                with torch.autocast("cpu", torch.bfloat16):
                    assert layer(torch.ones(1, 2)).item() == 2 * value
        assert torch.is_autocast_enabled("cpu") == enabled
        assert layer(torch.ones(1, 2)).item() == 4.0
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("seed", [True, 1.5, "a", 2**64, [1]])
def test_seeds_that_no_generator_takes(seed):
    before = torch.get_rng_state()
    with pytest.raises(RecipeError, match=r"The seed is .*, but must be a whole number"), isolated(seed=seed):
        pass
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, np.int64(3)])
def test_seeds_of_any_size_and_kind(seed):
    drawn = []
    for _ in range(2):
        with isolated(seed=seed):
            drawn.append((torch.rand(()).item(), np.random.random(), random.random()))  # noqa: NPY002
    assert drawn[0] == drawn[1]
