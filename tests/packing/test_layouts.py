import hashlib
import math

import numpy as np
import pytest
import torch

from sqs_pyro.errors import NetworkError, PackedFileError
from sqs_pyro.packing import CodedTensor, PackedTensor, entropy, layout_names, pack_tensor
from sqs_pyro.packing.layouts import pack_canonical
from sqs_pyro.testing.layouts import LayoutContract, random_coded

GOLDEN = {
    "codebook": torch.tensor([0, 188, 0, 60, 0, 64], dtype=torch.uint8),
    "table": torch.tensor([31, 16, 13, 8], dtype=torch.uint8),
    "codes": torch.tensor([126, 173, 64, 246, 78, 89, 88, 2], dtype=torch.uint8),
}


STRUCTURED_TABLE = [41, 41, 39, 247, 97, 242, 198, 209, 251]
STRUCTURED_CODES = (52, "83b59af95eb4bb71619c77444ab247a7e00474ee7e8989e008010cfb6ca2bc9d")


class TestDense(LayoutContract):
    layout = "dense"


class TestBitmap(LayoutContract):
    layout = "bitmap"


class TestEntropy(LayoutContract):
    layout = "entropy"


class TestConditional(LayoutContract):
    layout = "conditional"


class TestStructured(LayoutContract):
    layout = "structured"


class TestAdaptive(LayoutContract):
    layout = "adaptive"


class TestAuto(LayoutContract):
    layout = "auto"


def test_every_layout_keeps_the_contract():
    tested = {kit.layout for kit in LayoutContract.__subclasses__()}
    assert set(layout_names()) <= tested


@pytest.mark.parametrize(
    ("layout", "components", "nonzero_rate", "bits"),
    [
        ("dense", 3, 0.5, 2),  # zero takes one of the 4 symbols
        ("dense", 4, 0.5, 3),
        ("dense", 4, 1.0, 2),
        ("dense", 1, 1.0, 1),
        ("dense", 256, 1.0, 8),
        ("bitmap", 4, 0.5, 2),
        ("bitmap", 5, 0.5, 3),
        ("bitmap", 1, 0.5, 0),  # the mask says it all
    ],
)
def test_bits_and_bytes(layout, components, nonzero_rate, bits):
    coded = random_coded((80, 100), components, nonzero_rate=nonzero_rate)
    packed = pack_tensor(coded, layout)
    assert packed.bits == bits
    stored = coded.nonzeros if layout == "bitmap" else coded.mask.numel()
    assert packed.parts["codes"].numel() == math.ceil(stored * bits / 8)
    assert packed.parts["codebook"].numel() == 2 * components


def test_dense_cannot_hold_257_symbols_and_auto_finds_another():
    coded = random_coded((64, 256), 256, nonzero_rate=0.9)
    with pytest.raises(NetworkError, match="256 codebook values and zero"):
        pack_tensor(coded, "dense")
    assert pack_tensor(coded).layout != "dense"


@pytest.mark.parametrize("nonzero_rate", [0.02, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("components", [1, 4, 16, 200])
def test_entropy_coding_reaches_the_entropy(nonzero_rate, components):
    """Within 0.2 % and the table of the empirical entropy, computed here from the counts."""
    odds = 1.0 / torch.arange(1, components + 1)
    codes = torch.multinomial(odds, 200_000, replacement=True).to(torch.uint8)
    mask = torch.rand(200_000) < nonzero_rate
    coded = CodedTensor(codes * mask, mask, torch.randn(1, components).half().float())
    counts = np.unique(coded.dense().numpy(), return_counts=True)[1]
    entropy_bytes = float(-(counts * np.log2(counts / counts.sum())).sum()) / 8
    stream = pack_tensor(coded, "entropy").parts["codes"].numel()
    assert entropy_bytes - 8 <= stream <= 1.002 * entropy_bytes + 8


def test_auto_takes_the_smallest():
    for nonzero_rate in (0.0, 0.1, 0.5, 1.0):
        coded = random_coded((100, 90), 16, nonzero_rate=nonzero_rate)
        sizes = {name: pack_tensor(coded, name).num_bytes for name in layout_names()}
        assert pack_tensor(coded).num_bytes == min(sizes.values())


def test_uniform_codes_are_cheapest_in_fixed_bits():
    assert pack_tensor(random_coded((100, 100), 16, nonzero_rate=1.0)).layout == "dense"


def test_all_zero_tensor_costs_next_to_nothing():
    assert pack_tensor(random_coded((512, 512), 16, nonzero_rate=0.0)).num_bytes == 2


def test_entropy_streams_written_before_still_decode():
    """The coder's arithmetic is part of the format: these bytes must give these codes for ever."""
    packed = PackedTensor(
        layout="entropy",
        shape=(4, 6),
        bits=0,
        nonzeros=9,
        num_groups=1,
        num_components=3,
        codebook_dtype="float16",
        parts=GOLDEN,
    )
    expected = [0, 0, 1, 0, -1, 0, 0, 0, 2, 0, 0, 1, 0, 0, 0, -1, -1, 0, 0, 2, 1, 0, 0, -1]
    assert packed.unpack().dense().reshape(-1).tolist() == expected
    again = pack_tensor(packed.unpack(), "entropy").parts
    assert {name: part.tolist() for name, part in again.items()} == {k: v.tolist() for k, v in GOLDEN.items()}


def test_structured_bytes_are_those_of_the_format():
    """Every machine codes under the same probabilities: what one has written is what all read."""
    place = torch.arange(8 * 6 * 9).view(8, 6, 3, 3)
    mask = (place * 7 % 11 < 4) & (torch.arange(8) % 3 > 0)[:, None, None, None]
    coded = CodedTensor((place % 3).to(torch.uint8) * mask, mask, torch.tensor([[-1.0, 1.0, 2.0]]))
    packed = pack_tensor(coded, "structured")
    table = torch.tensor(STRUCTURED_TABLE, dtype=torch.uint8)
    known = pack_canonical(packed.unpack(), "structured", table)
    digest = hashlib.sha256(known.parts["codes"].numpy().tobytes()).hexdigest()
    assert (known.parts["codes"].numel(), digest) == STRUCTURED_CODES
    assert torch.equal(known.unpack().dense(), coded.dense())


@pytest.mark.parametrize("components", [3, 255, 256])
def test_entropy_streams_do_not_depend_on_the_pieces_they_are_made_in(components, monkeypatch):
    coded = random_coded((70, 100), components, groups=7, nonzero_rate=0.7)
    whole = pack_tensor(coded, "entropy")
    monkeypatch.setattr(entropy, "_CHUNK", 999)
    pieces = pack_tensor(coded, "entropy")
    assert torch.equal(pieces.parts["codes"], whole.parts["codes"])
    assert torch.equal(whole.unpack().dense(), coded.dense())


def test_unknown_layout():
    with pytest.raises(NetworkError, match="Layout 'densest' is unknown: allowed are auto, "):
        pack_tensor(random_coded((3, 3), 2), "densest")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"layout": "other"}, "layout 'other' is unknown"),
        ({"shape": ()}, "not one of a weight tensor"),
        ({"shape": (0, 4)}, "not one of a weight tensor"),
        ({"nonzeros": 1000}, "1000 non-zeros are impossible"),
        ({"num_groups": 7}, "7 codebooks cannot share"),
        ({"num_components": 0}, "0 components"),
        ({"codebook_dtype": "int4"}, "neither float16 nor float32"),
        ({"bits": 5}, "5 bits a code are given where the layout takes 3"),
        ({"parts": {}}, "has the parts"),
    ],
)
def test_contradicting_fields(change, sentence):
    packed = pack_tensor(random_coded((8, 8), 6), "bitmap")
    with pytest.raises(PackedFileError, match=sentence):
        PackedTensor(**{**vars(packed), **change})


def flipped(first: CodedTensor, rate: float, draws: int) -> CodedTensor:
    """Draws that differ from the first in a share of the weights, which take another symbol at random."""
    random = torch.Generator().manual_seed(1)
    kinds = first.num_components + 1
    symbols = ((first.codes.long() + 1) * first.mask).unsqueeze(-1).repeat(*[1] * first.codes.dim(), draws)
    others = torch.randint(0, kinds, symbols.shape, generator=random)
    flips = torch.rand(symbols.shape, generator=random) < rate
    flips[..., 0] = False
    symbols = torch.where(flips, others, symbols)
    return CodedTensor((symbols - 1).clamp_min(0).to(torch.uint8), symbols != 0, first.codebook)


def conditional_entropy_bytes(draws: CodedTensor) -> float:
    """Of the first draw's symbols, and of the others' given it: what no coder of this form can go below."""
    symbols = ((draws.codes.long() + 1) * draws.mask).reshape(-1, draws.shape[-1]).numpy()

    def bits(values):
        counts = np.bincount(values.ravel())
        return -(counts[counts > 0] * np.log2(counts[counts > 0] / counts.sum())).sum()

    first = symbols[:, 0]
    return (bits(first) + sum(bits(symbols[first == kind, 1:]) for kind in np.unique(first))) / 8


@pytest.mark.parametrize(("components", "rate"), [(4, 0.02), (16, 0.1), (3, 0.5)])
def test_draws_are_coded_near_their_conditional_entropy(components, rate):
    draws = flipped(random_coded((100, 300), components, nonzero_rate=0.2), rate, 6)
    packed = pack_tensor(draws, "conditional")
    assert torch.equal(packed.unpack().dense(), draws.dense())
    assert packed.parts["table"].numel() == (components + 1) * (components + 2)
    least = conditional_entropy_bytes(draws)
    assert least <= packed.parts["codes"].numel() <= 1.01 * least + 8
    if rate < 0.5:
        assert packed.num_bytes < 0.6 * pack_tensor(draws, "entropy").num_bytes


def test_equal_draws_cost_next_to_nothing():
    one, many = (flipped(random_coded((100, 300), 4), 0.0, draws) for draws in (1, 20))
    small, large = (pack_tensor(draws, "conditional") for draws in (one, many))
    assert large.num_bytes == small.num_bytes + 25  # a table a symbol, and no codes


def test_auto_does_not_try_layouts_for_draws():
    draws = flipped(random_coded((100, 300), 4), 0.01, 20)
    assert pack_tensor(draws).layout != "conditional"


def test_a_context_without_frequencies_is_noticed():
    packed = pack_tensor(flipped(random_coded((50, 60), 3), 0.3, 4), "conditional")
    table = packed.parts["table"].clone()
    table[4:8] = 0  # what follows a first symbol of 0
    broken = PackedTensor(**{**vars(packed), "parts": {**packed.parts, "table": table}})
    with pytest.raises(PackedFileError, match="table of frequencies is empty"):
        broken.unpack()
