"""One weight coded as it is packed: in units of its scales, at a size or at a β."""

from dataclasses import replace

import torch
from torch import Tensor

from sqs_pyro.compression.blockwise.channel_scales import (
    channel_scales,
    scale_bits,
    scales_of_few,
    size_scales,
)
from sqs_pyro.compression.blockwise.codebooks import UniformCodebook, best_parts
from sqs_pyro.compression.blockwise.laplace import LayerLikelihood
from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.compression.blockwise.sequential_coding import Coding, fit
from sqs_pyro.packing import CodedTensor


def scales_of(
    weight: Tensor,
    importance: Tensor,
    recipe: BlockwiseRecipe,
    *,
    few: bool = False,
    by_size: bool = False,
    groups: bool = False,
    precisions: Tensor | None = None,
) -> Tensor | None:
    """Return the scales of a weight's rows, ``[N]``: where they are worth their bits, or the grid needs them.

    With groups of inputs they are of these, ``[N, B]``, whether they are worth it or not.

    Args:
        weight: w, ``[N, M]``.
        importance: g, ``[N]``.
        recipe: whether it may have scales, and its grid.
        few: whether values are too few for the grid that its bits ask for. What rows that matter more take of
            them, others lack: scales are then those of sizes alone.
        by_size: whether scales by the size of each row are tried, too.
        groups: whether groups of inputs have scales, where the recipe says so.
        precisions: of inputs, ``[M]``, by which weights count in a size; all alike if left out.
    """
    uniform = recipe.grid == "uniform"
    if groups and recipe.group_size is not None:
        return size_scales(weight, weight.shape[1] // recipe.group_size, precisions)
    found = None
    if recipe.channel_scales and few:
        found = scales_of_few(weight, importance, recipe.num_components, precisions)
    elif recipe.channel_scales:
        found = channel_scales(weight, importance, by_size=by_size or uniform)
    return torch.ones(len(weight)) if found is None and uniform else found


def coded_weight(
    own: LayerLikelihood,
    scales: Tensor | None,
    recipe: BlockwiseRecipe,
    *,
    bits: float | None,
    beta: float | None,
    max_components: int | None = None,
) -> tuple[CodedTensor, dict[str, float]]:
    """Code a weight ``[N, M]``.

    Args:
        own: its likelihood, of a rank's own rows; all ranks call this together.
        scales: of all its rows, or of equal parts of them; a uniform grid needs them.
        recipe: kind of codewords, and rounds.
        bits: for each weight, its scales' included; or
        beta: β.
        max_components: K at most, of a uniform grid K itself; the recipe's if left out.

    Returns:
        What is packed, and ``bits``, ``beta`` and ``error`` of it.
    """
    extra = scale_bits(scales, own.mean.shape[1])
    coding = fit(
        own.in_units_of(scales),
        bits=None if bits is None else bits - extra,
        beta=beta,
        max_components=max_components or recipe.num_components,
        rounds=recipe.rounds,
        uniform=recipe.grid == "uniform",
    )
    hard = coding.coded(scales) if recipe.grid == "free" else _whole_numbers(coding, own, scales)
    error = own.relative_error(hard.dense()[own.shares.own].to(own.mean))  # codewords as float16 will have them
    return hard, {"bits": coding.bits_per_weight + extra, "beta": coding.beta, "error": error}


def _whole_numbers(coding: Coding, own: LayerLikelihood, scales: Tensor | None) -> CodedTensor:
    """Return it with whole numbers as codewords, and in each row's or part's scale the step that suits it best."""
    assert scales is not None
    grid = UniformCodebook(len(coding.codewords))
    step = coding.codewords[-1] / grid.places[-1]
    mine = own.shares.own
    if coding.parts is not None:
        steps = (step * coding.parts).half().float()
        found = best_parts(own.in_units_of(steps), coding.symbols[mine], grid.places)
        return replace(coding, codewords=grid.places.float(), parts=own.shares.joined(found)).coded()
    rows = grid.row_scales(own, coding.symbols[mine], step * scales[mine].to(step))
    return replace(coding, codewords=grid.places.float()).coded(own.shares.joined(rows).cpu())
