"""Scales of a layer's outputs: what they promise, what they keep, and what they cost."""

import math
from dataclasses import replace

import pytest
import torch

from sqs_pyro.compression.blockwise.channel_scales import channel_scales, scale_bits
from sqs_pyro.compression.blockwise.coded_weight import scales_of
from sqs_pyro.compression.blockwise.laplace import LayerLikelihood
from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.compression.blockwise.sequential_coding import fit


def layer(spread, matched=True, outputs=96, inputs=256):
    """A layer whose outputs matter differently: log g has the standard deviation ``spread``.

    Matched: outputs that matter more have smaller weights, so that all have one spread in the right units.
    """
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=random)
    x = torch.randn(2000, inputs, generator=random) @ torch.randn(inputs, inputs, generator=random)
    importance = (spread * torch.randn(outputs, generator=random)).exp()
    if matched:
        weight = weight * importance.rsqrt()[:, None]
    return LayerLikelihood(weight, x.T @ x / inputs, importance).damped(0.01)


def test_alike_outputs_have_none():
    assert channel_scales(torch.randn(40, 256), torch.full((40,), 0.3)) is None
    assert channel_scales(torch.randn(40, 64), 1 + 0.1 * torch.rand(40)) is None
    assert channel_scales(torch.zeros(40, 64), torch.rand(40)) is None
    assert channel_scales(torch.randn(40, 64), torch.zeros(40)) is None


def test_are_the_inverse_root_of_the_importance():
    importance = torch.tensor([1.0, 4.0, 16.0, 256.0])
    scales = channel_scales(torch.randn(4, 4096) * importance.rsqrt()[:, None], importance)
    torch.testing.assert_close(scales / scales[0], importance.rsqrt(), rtol=1e-3, atol=0)
    assert float(scales.log().mean()) == pytest.approx(0, abs=1e-3)  # weights keep their size on the whole
    assert torch.equal(scales.half().float(), scales)


def test_are_less_steep_where_outputs_are_of_one_spread():
    importance = torch.tensor([1.0, 4.0, 16.0, 256.0])
    scales = channel_scales(torch.randn(4, 4096), importance)
    torch.testing.assert_close(scales / scales[0], importance.pow(-0.25), rtol=1e-3, atol=0)


def test_outputs_that_never_matter_have_a_finite_scale():
    importance = torch.tensor([1.0, 1.0, 0.0, 1e-30])
    scales = channel_scales(torch.randn(4, 4096) * torch.tensor([1.0, 1.0, 1e3, 1e3])[:, None], importance)
    assert scales.isfinite().all() and (scales > 0).all()


def test_units_change_nothing_but_the_weight():
    own = layer(1.0)
    scales = channel_scales(own.mean, own.importance)
    other = own.mean + 0.1 * torch.randn_like(own.mean)
    units = own.in_units_of(scales)
    assert units.excess(other / scales[:, None]) == pytest.approx(own.excess(other), rel=1e-4)
    torch.testing.assert_close(
        units.importance, torch.ones(96) * float(units.importance.mean()), rtol=2e-3, atol=0
    )


@pytest.mark.parametrize(
    ("bits", "matched"),
    [
        (2.5, True),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in ((2.5, False), (3.5, True), (3.5, False))),
    ],
)
def test_save_about_what_theory_promises(bits, matched):
    """At equal bits, those of the scales included, in bits: the loss falls by up to mean g / geometric mean."""
    own = layer(1.2, matched)
    g = own.importance.double()
    promised = 0.5 * math.log2(float(g.mean() / g.log().mean().exp()))
    scales = channel_scales(own.mean, own.importance)
    plain = fit(own, bits=bits)
    coded = fit(own.in_units_of(scales), bits=bits - scale_bits(scales, 256))
    loss = [own.relative_error(value.dense()) for value in (plain.coded(), coded.coded(scales))]
    saved = 0.5 * math.log2(loss[0] / loss[1])
    least = 0.5 if matched else 0.0  # rows of different spreads share one table of frequencies
    assert least * promised < saved < 1.5 * promised  # without scales, symbols are of a mixture, too


@pytest.mark.parametrize("spread", [0.3, 0.8])
def test_few_values_of_outputs_of_different_size_have_scales_by_size(spread):
    """As K-means itself finds it: of each row by itself in units of its size, and of all rows together."""
    own = layer(0.0)
    sizes = (spread * torch.randn(96, generator=torch.Generator().manual_seed(1))).exp()
    own = replace(own, mean=own.mean * sizes[:, None])
    scales = scales_of(own.mean, own.importance, BlockwiseRecipe(num_components=7, bits=3.0), few=True)
    expected = own.mean.square().mean(1).sqrt()
    torch.testing.assert_close(scales / scales[0], expected / expected[0], rtol=1e-3, atol=0)
    plain = fit(own, beta=1e-9, max_components=7)
    scaled = fit(own.in_units_of(scales), beta=1e-9, max_components=7)
    assert own.relative_error(scaled.coded(scales).dense()) < (1 - spread / 3) * own.relative_error(plain.dense())
    alike = scales_of(layer(0.0).mean, own.importance, BlockwiseRecipe(num_components=7, bits=3.0), few=True)
    assert alike is None


def test_few_values_have_none_as_they_would_lose():
    """Where symbols may not be finer, outputs that matter more take values that the others lack."""
    own = layer(1.2, matched=False)
    recipe = BlockwiseRecipe(num_components=7, bits=3.0)
    scales = scales_of(own.mean, own.importance, recipe)
    assert scales is not None and scales_of(own.mean, own.importance, recipe, few=True) is None
    plain = fit(own, beta=1e-9, max_components=7)
    scaled = fit(own.in_units_of(scales), beta=1e-9, max_components=7)
    assert own.relative_error(plain.dense()) < 0.8 * own.relative_error(scaled.coded(scales).dense())


@pytest.mark.parametrize(("bits", "few"), [(2.0, False), (2.1, True), (3.0, True)])
def test_values_are_few_for_more_than_all_but_one_of_their_bits(bits, few):
    assert BlockwiseRecipe(num_components=7, bits=bits).has_few_components(bits) == few
    assert not BlockwiseRecipe(bits=bits).has_few_components(bits)  # 31 values
