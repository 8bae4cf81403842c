"""Symbols of a panel: compiled, bit for bit what torch's calls give, and these beside a plain loop in float64."""

import pytest
import torch

from sqs_pyro.kernels.coding import chain_coding, conditional_coding, load_coding

needs_compiler = pytest.mark.skipif(not load_coding(torch.device("cpu")), reason="no C++ compiler")
FLOATS = [torch.float32, torch.float64]
# Inputs, rows, symbols: none, one, whole blocks of rows, and some more.
SIZES = [(1, 1, 1), (3, 0, 4), (64, 32, 2), (64, 101, 34), (17, 200, 256)]


def operands(inputs, rows, symbols, dtype, seed=0, scaled=False):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    matrix = normal(2 * inputs, 2 * inputs)[:inputs, :inputs]  # a part of a larger one, as a panel's is
    matrix.diagonal().abs_().add_(0.5)
    values = normal(symbols).mul_(3).round_().div_(2)  # some of them are equal, so that costs are
    rates, price = normal(symbols).abs(), normal(inputs, rows).abs()
    units = normal(inputs, rows).abs().add_(0.5) if scaled else None
    return normal(inputs, rows), normal(inputs, rows), matrix, values, rates, price, units


def chain(op, given):
    state, _, *others = given
    means, symbols = state.clone(), torch.empty(state.shape, dtype=torch.uint8)
    op(means, *others, symbols, errors := torch.empty_like(state))
    return means, symbols, errors


def conditional(op, given):
    state, weight, *others = given
    slopes, symbols = state.clone(), torch.empty(state.shape, dtype=torch.uint8)
    op(slopes, weight, *others, symbols, means := torch.empty_like(state), changes := torch.empty_like(state))
    return slopes, symbols, means, changes


OPS = [
    pytest.param(chain, chain_coding, id="chain"),
    pytest.param(conditional, conditional_coding, id="given others"),
]


def bits(value):
    """What a tensor is made of, for numbers that are none, too."""
    return value.contiguous().view(torch.uint8)


@needs_compiler
@pytest.mark.parametrize(("run", "op"), OPS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scaled", [False, True])
def test_compiled_it_is_the_same_bit_for_bit(run, op, size, dtype, scaled):
    given = operands(*size, dtype, scaled=scaled)
    for found, expected in zip(run(op, given), run(op._init_fn, given), strict=True):
        assert torch.equal(bits(found), bits(expected))


@needs_compiler
@pytest.mark.parametrize(("run", "op"), OPS)
def test_costs_that_are_no_numbers_choose_as_torch_does(run, op):
    given = operands(5, 40, 6, torch.float32)
    state, _, _, _, rates, price, _ = given
    rates[3], price[1, ::2], state[0, 5] = float("inf"), 0.0, float("nan")
    price[2, 7], state[1, 9] = float("inf"), float("-inf")
    found, expected = run(op, given), run(op._init_fn, given)
    assert torch.equal(found[1], expected[1])
    assert all(torch.allclose(one, other, equal_nan=True) for one, other in zip(found, expected, strict=True))
    assert (found[1][1, ::2] == 3).any()  # infinity times nothing


@needs_compiler
@pytest.mark.parametrize(("run", "op"), OPS)
def test_on_any_threads(run, op):
    given, before = operands(64, 500, 20, torch.float32), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(op, given)
        torch.set_num_threads(3)
        assert all(map(torch.equal, run(op, given), alone))
    finally:
        torch.set_num_threads(before)


def cheapest(mean, given, j, i):
    *_, values, rates, price, units = given
    unit = 1.0 if units is None else units[j, i]
    z = int(((mean / unit - values) ** 2 / 2 + price[j, i] * rates).argmin())
    return z, values[z] * unit


@pytest.mark.parametrize("scaled", [False, True])
def test_the_chain_is_that_of_a_plain_loop(scaled):
    given = operands(6, 9, 5, torch.float64, scaled=scaled)
    (means, symbols, errors), (state, _, upper, *_) = chain(chain_coding, given), given
    for i in range(9):
        mean = state[:, i].clone()
        for j in range(6):
            z, value = cheapest(mean[j], given, j, i)
            error = (mean[j] - value) / upper[j, j]
            assert symbols[j, i] == z and float(errors[j, i]) == pytest.approx(float(error))
            mean[j + 1 :] -= error * upper[j, j + 1 :]
        torch.testing.assert_close(means[:, i], mean)


@pytest.mark.parametrize("scaled", [False, True])
def test_given_all_others_is_that_of_a_plain_loop(scaled):
    given = operands(6, 9, 5, torch.float64, scaled=scaled)
    slopes, symbols, means, changes = conditional(conditional_coding, given)
    state, weight, curvature, *_ = given
    for i in range(9):
        slope = state[:, i].clone()
        for j in range(6):
            mean = weight[j, i] - slope[j] / curvature[j, j]
            z, value = cheapest(mean, given, j, i)
            assert symbols[j, i] == z and float(means[j, i]) == pytest.approx(float(mean))
            assert float(changes[j, i]) == pytest.approx(float(value - weight[j, i]))
            slope[j + 1 :] += changes[j, i] * curvature[j, j + 1 :]
        torch.testing.assert_close(slopes[:, i], slope)


@needs_compiler
@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({0: torch.zeros(3, 4, dtype=torch.float16)}, "float32 or float64"),
        ({0: torch.zeros(4, 3).T}, "lies in order"),
        ({1: torch.zeros(4, 4)}, "does not fit 3 inputs"),
        ({2: torch.zeros(300), 3: torch.zeros(300)}, "1 to 256 symbols"),
        ({3: torch.zeros(6)}, "have a value and a rate each"),
        ({4: torch.zeros(3, 5)}, "3 inputs and 4 rows"),
        ({5: torch.ones(3, 1)}, "3 inputs and 4 rows"),
        ({6: torch.zeros(3, 4)}, "3 inputs and 4 rows, and of its dtype"),
        ({7: torch.zeros(3, 4, dtype=torch.float64)}, "of its dtype"),
    ],
)
def test_what_does_not_fit_is_refused(changed, sentence):
    symbols = torch.zeros(3, 4, dtype=torch.uint8)
    given = [
        torch.zeros(3, 4),
        torch.eye(3),
        torch.zeros(5),
        torch.zeros(5),
        torch.ones(3, 4),
        None,
        symbols,
        torch.ones(3, 4),
    ]
    for place, value in changed.items():
        given[place] = value
    with pytest.raises(RuntimeError, match=sentence):
        torch.ops.sqs.chain_coding(*given)


def test_the_operators_are_ones_for_compilers():
    state, weight, *others = operands(4, 6, 5, torch.float32)
    symbols = torch.zeros(4, 6, dtype=torch.uint8)
    kinds = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(chain_coding, (state, *others, symbols, torch.zeros(4, 6)), **kinds)
    torch.library.opcheck(
        conditional_coding, (state, weight, *others, symbols, torch.zeros(4, 6), torch.zeros(4, 6)), **kinds
    )
