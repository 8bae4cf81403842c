"""What can be wrong with a posterior: when it counts as wrong, and the sentence that names the repair."""

from dataclasses import dataclass
from typing import Any

#: A finding is a measured value below its threshold.
THRESHOLDS = {
    "gates_closed": 0.01,  # share of the site's gates, those of pruned weights left out, that are open
    "gates_open": 1e-3,  # distance of the site's smallest gate to 1
    "starving_layer": 1.0,  # non-zero weights an output
    "narrow_component": 2e-3,  # σ in units of the root mean square weight; K-means stops at 1e-3
    "merged_components": 1.0,  # distance of neighbouring means in widths; K-means on its own leaves 2 to 3
    "unused_components": 0.5,  # share of the components that stand for a weight
    "vanishing_component": 0.5,  # |μ| in units of the root mean square of the weights it stands for
    "inert_averaging": 0.02,  # share of the weights at which a draw differs from the most probable network
    "unequal_layers": 1e-3,  # root mean square weight of the smallest layer in units of the largest's
    "equal_gates": 1e-6,  # difference of the network's largest and smallest gate logit
    "grown_weights": 0.01,  # root mean square of the pretrained weights in units of the present one
    "narrow_prior": 0.2,  # width of the prior's slab in units of the root mean square of the weights in it
    "uncompressed": 0.9,  # share of the network's parameters that is compressed
    "shared_batch_norm": 5.0,  # root mean square of a layer's weights in units of the width they are drawn with
    "missed_size": 0.9,  # the file's size over the one asked for, or the other way round, whichever is below 1
    "few_values": 1.0,  # bits a weight that a language model has, over those asked for
    "not_finished": 1.0,  # divergence from the original network before the last steps, over that behind them
    "by_structure": 1.0,  # whether the network's architecture is known: 0 if not
    "unreached_experts": 1.0,  # share of a mixture's experts that calibration reached
    "unrepeatable": 1.0,  # 1 / (1 + relative difference of a network's outputs from one call to the next)
}
_SENTENCES = {
    "gates_closed": "Posterior collapse in '{site}': only {measured:.2%} of the gates that pruning left are open, "
    "because the KL pulls them to the spike; lower kl_weight{inclusion}.",
    "gates_open": "Posterior collapse in '{site}': every gate is within {measured:.1g} of 1, where its gradient "
    "vanishes, so that the posterior says nothing of zeros; lower initial_gate{schedule}.",
    "starving_layer": "Layer '{site}' starves: it has {measured:.2g} non-zero weights for each output; "
    "{denser}, or exclude the layer.",
    "narrow_component": "A component of '{site}' is only {measured:.1g} of the layer's weights wide, and "
    "gradients of the KL grow as 1/(σ² τ); raise the temperature, or use fewer components than there are distinct "
    "weights.",
    "merged_components": "Two components of '{site}' are {measured:.2g} widths apart and have become one; use "
    "fewer components, or {gentler}.",
    "unused_components": "Only {measured:.0%} of the components of '{site}' stand for a weight; use fewer "
    "components, or finer windows (per_weight).",
    "vanishing_component": "A codebook value of '{site}' is {measured:.2g} of the size of the weights it stands "
    "for, a second zero beside the exact one; {gentler}, or use more components.",
    "inert_averaging": "Drawn networks differ from the most probable one in {measured:.2%} of the weights only, "
    "so that averaging them does nothing; {repair}.",
    "unequal_layers": "The weights of '{site}' are {measured:.1g} of the size of those of '{largest}', so that "
    "one threshold for the magnitudes of all layers prunes them first; set pruning.scope to 'layer', or "
    "pruning.saliency to 'activation'.",
    "equal_gates": "All gates are equal, so that pruning by saliency 'gate' goes by the position of weights; set "
    "gate_learning_rate above 0, or pruning.saliency to 'magnitude'.",
    "grown_weights": "Training has made the weights of '{site}' {times:.1g} times as large as they were; unless "
    "they had to grow from almost nothing, lower learning_rate{or_kl}.",
    "narrow_prior": "The prior of '{site}' is {measured:.2g} of the size of the weights that the posterior finds, "
    "and holds them back; by default it is as wide as the network's own weights, which says nothing of one that "
    "was not trained: give prior=SpikeAndSlab(0.5, Normal(0.0, 1.0)) of a width that suits, or LearnedSlab().",
    "uncompressed": "Only {measured:.1%} of the network's {total:,} parameters are compressed; the largest others "
    "are {largest}. Name what is to be compressed in include=[...], which replaces the choice by layer type.",
    "shared_batch_norm": "Weights of '{site}' are drawn with a width of {width:.0%} of their size, and what batch "
    "norms do to a draw's activations, running statistics do not know: set model.batch_norm_inputs to a minibatch "
    "of training inputs, or average by averaged_network(model.net, guide, loader=train, batch_norm_batches=15): "
    "each draw then has statistics of its own.",
    "missed_size": "The file is {ratio:.1f} times smaller than fp32, and target_ratio={asked:g} was asked "
    "for{repair}.",
    "few_values": "The network has {measured:.1%} of the {asked:.2f} bits a weight that were asked for, as zero "
    "and {values} values take no more of them; allow more values (blockwise.num_components, "
    "blockwise.runtime_bits).",
    "not_finished": "The last {steps} steps of SVI were not taken, as the network was {measured:.3f} times as far "
    "from the original one before them as behind them; lower blockwise.codebook_learning_rate and "
    "leftover_learning_rate, or give more steps or text.",
    "by_structure": "The architecture is unknown, so that its layers were found by structure: {listed}; see that "
    "none is missing, or register an architecture.",
    "unreached_experts": "The router of '{site}' sent no token of the calibration to experts {experts}, which are "
    "compressed by what all tokens are; give more text, or of other kinds.",
    "unrepeatable": "The network's outputs differ from call to call even in evaluation mode, so that packed and "
    "dense weights could not be compared; make its forward follow torch's random state and `training`.",
}


@dataclass(frozen=True)
class Finding:
    """Something wrong with a posterior.

    Attributes:
        kind: what, a key of :data:`THRESHOLDS`.
        site: where; None for the whole network.
        measured: the value found.
        threshold: what it should not be below.
        sentence: what was found, and the repair.
    """

    kind: str
    site: str | None
    measured: float
    threshold: float
    sentence: str

    def __str__(self) -> str:
        return self.sentence


def finding(kind: str, site: str | None, measured: float, **words: Any) -> Finding:
    """Return a finding of a kind, whose sentence takes these words."""
    sentence = _SENTENCES[kind].format(site=site, measured=measured, **words)
    return Finding(kind, site, measured, THRESHOLDS[kind], sentence)


def unrepeatable(difference: float) -> Finding:
    """Return the finding that a network's outputs change from call to call, by so much of the largest."""
    return finding("unrepeatable", None, 1 / (1 + difference))


def size_findings(asked: float, ratio: float, num_components: int) -> list[Finding]:
    """Return the finding, if it is one, that a file has another ratio than the one that was asked for."""
    reached = min(ratio / asked, asked / ratio)
    if reached >= THRESHOLDS["missed_size"]:
        return []
    repair = f": {num_components} codewords cannot take more bits, raise num_components" if ratio > asked else ""
    return [finding("missed_size", None, reached, ratio=ratio, asked=asked, repair=repair)]
