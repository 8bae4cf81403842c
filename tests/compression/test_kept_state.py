"""State that is kept between calls belongs to one network, data set and recipe and is intact, or is refused."""

from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from sqs_pyro import compress, compress_transformer
from sqs_pyro.compression import checkpoint
from sqs_pyro.compression.baseline import BaselineRecipe, train_baseline
from sqs_pyro.compression.checkpoint import write_checkpoint
from sqs_pyro.fingerprint import described, loader_fingerprint, network_fingerprint
from sqs_pyro.kernels import dense_state
from sqs_pyro.testing.kept_state import KeptStateContract

transformers = pytest.importorskip("transformers")
RECIPE = {"epochs": 1, "num_components": 2, "nonzero_rate": 0.5, "batch_norm_batches": 0}


def network(seed=0, activation=nn.ReLU, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), activation(), nn.Linear(width, 3))


def examples(seed=0, count=32):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(count, 8, generator=generator), torch.randint(3, (count,), generator=generator)
    )


def loader(data=None, batch_size=16, order=0, shuffle=True):
    generator = torch.Generator().manual_seed(order)
    return DataLoader(data or examples(), batch_size=batch_size, shuffle=shuffle, generator=generator)


def values(state):
    return {name: value.tolist() for name, value in state.items()}


OF_TRAINING = {
    "weights": ({"net": network(1)}, r"of another network \('0\.weight' has other values\)"),
    "width": ({"net": network(width=5)}, r"of another network \(module 0: 'Linear\(.*out_features=6.*=5"),
    "modules": ({"net": network(activation=nn.GELU)}, r"of another network \(module 1: 'ReLU\(\)' -> .GELU"),
    "examples": ({"data": loader(examples(1))}, r"with other data \('?content'? .*"),
    "number": ({"data": loader(examples(count=48))}, r"with other data \(minibatches: 2 -> 3, examples: 32 -> 48"),
    "batch size": ({"data": loader(batch_size=8)}, r"with other data \(minibatches: 2 -> 4, batch_size: 16 -> 8"),
    "order": ({"data": loader(order=1)}, r"with other data \(order: 'RandomSampler, seed 0' -> .* seed 1'\)"),
    "shuffling": ({"data": loader(shuffle=False)}, r"with other data \(order: 'RandomSampler.* -> 'Sequential"),
}


class TestTrainingCheckpoint(KeptStateContract):
    changes = OF_TRAINING | {
        "recipe": ({"recipe": {"nonzero_rate": 0.4}}, r"with another recipe \(nonzero_rate: 0\.5 -> 0\.4\)"),
        "section": ({"recipe": {"prior": {"inclusion": 0.2}}}, r"another recipe \(prior\.inclusion: .* -> 0\.2\)"),
        "seed": ({"seed": 1}, r"with another setting \(seed: 0 -> 1\)"),
    }

    def call(self, path, net=None, data=None, recipe=None, **options):
        data = data or loader()
        data.generator.manual_seed(data.generator.initial_seed())  # a loader of its own for each call
        result = compress(net or network(), data, RECIPE | (recipe or {}), checkpoint=path, **options)
        return values(result.hard.state_dict())


class TestBaseline(KeptStateContract):
    changes = OF_TRAINING | {"recipe": ({"lr": 0.2}, r"with another recipe \(lr: 0\.1 -> 0\.2\)")}

    def call(self, path, net=None, data=None, lr=0.1):
        net = nn.Sequential(*(net or network()))
        before = {name: value.clone() for name, value in net.state_dict().items()}
        train_baseline(net, data or loader(), None, BaselineRecipe(epochs=1, learning_rate=lr), checkpoint=path)
        trained = values(net.state_dict())
        net.load_state_dict(before)
        return trained


def llama(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=32, initializer_range=0.3, pad_token_id=0, **options)
    return transformers.LlamaForCausalLM(config).eval()


def sequences(seed=0):
    return torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(seed))


class TestPlanAndBlocks(KeptStateContract):
    changes: ClassVar[dict[str, tuple[dict[str, Any], str]]] = {
        "weights": ({"net": llama(1)}, r"of another network \('model\.embed_tokens\.weight' has other values\)"),
        "options": ({"net": llama(rms_norm_eps=1e-3)}, r"of another network \(.*(eps|1e-06).* -> .*0\.001"),
        "texts": ({"data": sequences(1)}, r"with other data \('?sequences'? .*"),
        "batch size": ({"recipe": {"batch_size": 2}}, r"with another recipe \(batch_size: 4 -> 2\)"),
        "recipe": ({"recipe": {"bits": 3.0}}, r"with another recipe \(bits: 4\.0 -> 3\.0\)"),
    }

    def files(self, path):
        return sorted(path.iterdir())

    def call(self, path, net=None, data=None, recipe=None):
        keys = {"bits": 4.0, "batch_size": 4, "settle_steps": 0, "importance_sequences": 4, "rounds": 1}
        data = sequences() if data is None else data
        result = compress_transformer(net or llama(), data, keys | (recipe or {}), directory=path)
        return values(dense_state(result.network))


class TestFingerprints:
    def test_random_numbers_and_epochs_are_left_alone(self):
        class Augmented(Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, i):
                return torch.rand(3), i

        torch.manual_seed(5)
        before, data = torch.get_rng_state(), loader(Augmented(), batch_size=2)
        order = data.generator.get_state()
        assert loader_fingerprint(data) == loader_fingerprint(data)
        assert torch.equal(torch.get_rng_state(), before) and torch.equal(data.generator.get_state(), order)

    def test_one_bit_of_any_tensor_counts(self):
        net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        before = network_fingerprint(net)
        for name, value in net.state_dict().items():
            value.view(-1)[0] += 1
            now = network_fingerprint(net)
            assert [key for key in now if now[key] != before[key]] == [name]
            before = now

    def test_numbers_of_a_module_of_ones_own_count_and_what_it_computed_does_not(self):
        class Scaled(nn.Linear):
            def __init__(self, factor):
                super().__init__(2, 2, bias=False)
                self.factor, self.name_or_path, self.seen = factor, str(factor), torch.full((1,), factor)
                nn.init.ones_(self.weight)

        one, same, other = (network_fingerprint(Scaled(factor)) for factor in (1.0, 1.0, 3.0))
        assert one == same
        assert [key for key in one if one[key] != other[key]] == ["module of all, factor"]

    def test_functions_count_with_their_bodies_and_what_they_hold(self):
        def scaled(factor):
            return lambda logits, shift=0.0: logits * factor + shift

        def in_a_set(name):
            return name in {"a", "b", "c", "d"}

        assert described(scaled(2.0)) == described(scaled(2.0)) != described(scaled(3.0))
        assert described(lambda x: x + 1) != described(lambda x: x * 2)
        assert described(torch.nn.functional.relu) == "torch.nn.functional.relu"
        assert described(in_a_set).startswith(f"{__name__}.")

    def test_what_a_loader_does_to_its_examples_counts(self):
        class Doubled(TensorDataset):
            def __getitem__(self, i):
                x, y = super().__getitem__(i)
                return 2 * x, y

        data, odd = examples(), torch.arange(32) % 2
        loaders = [
            DataLoader(data, 8),
            DataLoader(Doubled(*data.tensors), 8),
            DataLoader(data, 8, collate_fn=lambda pairs: pairs),
            *(
                DataLoader(data, 8, sampler=WeightedRandomSampler(weights, 32))
                for weights in (odd + 0.5, odd + 1.0)
            ),
        ]
        found = [loader_fingerprint(each) for each in loaders]
        assert found == [loader_fingerprint(each) for each in loaders]
        assert all(found[i] != found[j] for i in range(5) for j in range(i))

    def test_a_loader_without_a_data_set_is_asked_for_its_first_minibatch(self):
        class Pairs(list):
            dataset = None

        one, other = (Pairs([(torch.full((2, 3), value), torch.zeros(2))]) for value in (0.0, 1.0))
        assert loader_fingerprint(one)["content"] != loader_fingerprint(other)["content"]


@pytest.mark.parametrize("call", [1, 3, 6])
def test_ctrl_c_while_a_checkpoint_is_written_is_itself_and_leaves_the_one_before(call, tmp_path, monkeypatch):
    """torch, which calls us for every part, makes errors of its own of what is raised there."""
    path, calls = tmp_path / "c.pt", iter(range(1, 100))
    write_checkpoint(path, {"a": torch.zeros(10)})
    before = path.read_bytes()
    write = checkpoint._Sealing.write

    def interrupted(self, data):
        if next(calls) == call:
            raise KeyboardInterrupt
        return write(self, data)

    monkeypatch.setattr(checkpoint._Sealing, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(path, {"a": torch.ones(10), "b": torch.ones(1000)})
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["c.pt"]
