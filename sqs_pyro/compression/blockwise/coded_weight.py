"""One weight coded as it is packed: in units of its scales, at a size or at a β."""

from torch import Tensor

from sqs_pyro.compression.blockwise.channel_scales import scale_bits
from sqs_pyro.compression.blockwise.laplace import LayerLikelihood
from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.compression.blockwise.sequential_coding import fit
from sqs_pyro.packing import CodedTensor


def coded_weight(
    own: LayerLikelihood,
    scales: Tensor | None,
    recipe: BlockwiseRecipe,
    *,
    bits: float | None,
    beta: float | None,
) -> tuple[CodedTensor, dict[str, float]]:
    """Code a weight ``[N, M]``.

    Args:
        own: its likelihood.
        scales: of its rows.
        recipe: codewords and rounds.
        bits: for each weight, its scales' included; or
        beta: β.

    Returns:
        What is packed, and ``bits``, ``beta`` and ``error`` of it.
    """
    extra = scale_bits(scales, own.mean.shape[1])
    coding = fit(
        own.in_units_of(scales),
        bits=None if bits is None else bits - extra,
        beta=beta,
        max_components=recipe.num_components,
        rounds=recipe.rounds,
    )
    hard = coding.coded(scales)
    error = own.relative_error(hard.dense().to(own.mean))  # codewords as float16 will have them
    return hard, {"bits": coding.bits_per_weight + extra, "beta": coding.beta, "error": error}
