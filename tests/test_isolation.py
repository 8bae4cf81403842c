"""Calls leave process, thread and networks as they found them, and do not depend on how they found them."""

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyro
import pytest
import torch
from kits.ambient import AMBIENT, float64
from kits.untouched import untouched
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sqs_pyro import compress
from sqs_pyro.errors import SQSError
from sqs_pyro.isolation import isolated

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


def weights(result) -> dict:
    return {name: tensor.clone() for name, tensor in result.hard.state_dict().items()}


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
