"""From a trained guide to the network that is shipped."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.inference.guides.checks import check_like_sites
from sqs_pyro.inference.guides.posterior import PosteriorGuide
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.isolation import isolated, isolating
from sqs_pyro.kernels import PackedEnsemble, packed_ensemble, packed_network
from sqs_pyro.packing import CodedTensor
from sqs_pyro.packing.contents import with_metadata
from sqs_pyro.packing.leftovers import round_leftovers
from sqs_pyro.packing.stored import METADATA
from sqs_pyro.shipping.agreement import check_agreement
from sqs_pyro.shipping.batch_norm import batch_norm_statistics, fold_batch_norm, reestimate_batch_norm
from sqs_pyro.shipping.shipped import copied, shipped_network
from sqs_pyro.shipping.widths import WIDTHS, with_widths

__all__ = [
    "batch_norm_statistics",
    "fold_batch_norm",
    "hard_network",
    "network_with",
    "pack",
    "pack_ensemble",
    "reestimate_batch_norm",
    "round_leftovers",
]


def hard_network(net: nn.Module, coded: Mapping[str, CodedTensor]) -> nn.Module:
    """Return a copy of ``net`` with dense weights that are exactly the coded tensors' values.

    Args:
        net: the network; its other parameters and buffers are copied as they are.
        coded: hardened weights by parameter name.
    """
    return network_with(net, {name: tensor.dense() for name, tensor in coded.items()})


def network_with(net: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of ``net`` with other values in the named parameters.

    Raises:
        NetworkError: the network has no parameter of a name, or one of another shape.
    """
    changed = copied(net)
    parameters = dict(changed.named_parameters(remove_duplicate=False))  # any name of a tied one
    with torch.no_grad():
        for name, value in weights.items():
            check_like_sites("weight", name, value, parameters)  # copy_ would broadcast
            parameters[name].copy_(value)
    return changed


@isolated(sees_parameters=True)
def pack(
    source: Any,
    *,
    layout: str | None = None,
    leftover_dtype: str | None = None,
    codebook_dtype: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    inputs: Any | None = None,
) -> nn.Module:
    """Return the packed network of a compression result or of a trained guide.

    Batch norms are folded and other parameters rounded by
    :func:`~sqs_pyro.shipping.shipped.shipped_network`.

    Args:
        source: a :class:`~sqs_pyro.compression.finetune.call.CompressionResult`, whose packed network is returned
            as it is, or packed anew where anything else is asked for; or a :class:`SpikeGMMGuide` made for a
            ``BayesianNetwork``, whose most probable network is packed.
        layout: ``"auto"``, or a layout's name. This and the dtypes are by default a result's recipe's; of a guide
            ``"auto"`` and ``"float16"``.
        leftover_dtype: of parameters that are not compressed, each where its values survive that.
        codebook_dtype: of codebook values, each codebook where its values survive that.
        metadata: written into the file; beside what a result's has.
        inputs: a minibatch's, on which dense and packed weights must agree; None does not compare.

    Raises:
        NetworkError: the guide's model has no network, or it is still in its dense stage; the packed network would
            compute something else; or options are given that this source cannot honour.
    """
    options = {"layout": layout, "leftover_dtype": leftover_dtype, "codebook_dtype": codebook_dtype}
    if isinstance(getattr(source, "network", None), nn.Module):
        if metadata is None and not any(options.values()):
            # Nothing else is asked for: what was packed, judged and reported is what is handed out.
            packed, dense = source.network, getattr(source, "hard", None)
        else:
            packed, dense = _packed_anew(source, options, metadata)
    elif isinstance(source, SpikeGMMGuide):
        coded = source.harden(_dtype("codebook_dtype", codebook_dtype or "float16"))
        dense = shipped_network(
            hard_network(_network_of(source), coded), coded, leftover_dtype or "float16", inputs
        )
        # leftover_dtype=None: they are rounded already, as judged; a second rounding could only differ from it.
        about = with_widths(metadata, source) if source.estimator == "one_hot" else metadata
        packed = packed_network(dense, coded, layout=layout or "auto", leftover_dtype=None, metadata=about)
    else:
        raise NetworkError(
            f"pack was given a {type(source).__name__}, but packs a SpikeGMMGuide or a CompressionResult."
        )
    if inputs is not None and dense is not None:
        check_agreement(dense, packed, inputs)
    return packed


@isolating(sees_parameters=True)
def pack_ensemble(
    source: Any,
    num_samples: int = 20,
    *,
    temperature: float | None = None,
    gate_temperature: float | None = None,
    layout: str = "auto",
    leftover_dtype: str | None = None,
    codebook_dtype: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> PackedEnsemble:
    """Draw networks from a posterior and pack them as one, whose forward gives their averaged log-probabilities.

    Codebooks and everything that is not compressed are shared; :func:`~sqs_pyro.save` writes one file. Of a dense
    posterior codebooks are fitted to its draws. Draws follow torch's random state, which stays as it is:
    ``torch.manual_seed`` chooses other ones.

    Args:
        source: a :class:`~sqs_pyro.compression.finetune.call.CompressionResult`, whose shipped norms and biases
            are used, or a :class:`SpikeGMMGuide` made for a ``BayesianNetwork``, or a ``GuideMixture`` of such.
        num_samples: S, networks to draw.
        temperature, gate_temperature: see :meth:`SpikeGMMGuide.evaluation_temperatures`.
        layout: ``"auto"``, which tries ``"conditional"`` too, or a layout's name.
        leftover_dtype, codebook_dtype: as for :func:`pack`.
        metadata: written into the file, over that of a result's packed network.
        seed: of the draws; without it they follow torch's random state, which stays as it is, so that the same
            call draws the same again.

    Raises:
        NetworkError: the source is none of these.
    """
    guide = getattr(source, "guide", source)
    if not isinstance(guide, PosteriorGuide):
        raise NetworkError(
            f"pack_ensemble was given a {type(source).__name__}, but draws from a SpikeGMMGuide, a GuideMixture "
            "or a CompressionResult."
        )
    if guide is source:
        # Any dense values will do for the compressed parameters: draws come in their place.
        net, about = shipped_network(_network_of(guide), guide.site_names, leftover_dtype or "float16"), {}
    else:
        net, about = _with_leftovers(source, leftover_dtype), getattr(source.network, METADATA)
        codebook_dtype = codebook_dtype or source.recipe.codebook_dtype
    dtype = _dtype("codebook_dtype", codebook_dtype or "float16")
    if not isinstance(num_samples, int) or num_samples < 1:
        raise NetworkError(f"num_samples is {num_samples!r}, but must be a whole number of draws, at least 1.")
    # One rounding for all: draws that share a codebook are stored with it once.
    draws = guide.draw_networks(num_samples, temperature, gate_temperature, dtype)
    # Draws are there already; widths would be those of one network.
    about = with_metadata({key: value for key, value in about.items() if key != WIDTHS}, metadata)
    return packed_ensemble(net, draws, layout=layout, leftover_dtype=None, metadata=about)


def _packed_anew(
    source: Any, options: Mapping[str, str | None], metadata: Mapping[str, Any] | None
) -> tuple[nn.Module, nn.Module]:
    """Return a result's network packed in another way, and its dense twin."""
    # A checkpoint's or a foreign result has a network and no posterior to harden again.
    guide = getattr(source, "guide", None)
    if not isinstance(guide, SpikeGMMGuide):
        given = ", ".join(
            [name for name, value in options.items() if value] + ["metadata"] * (metadata is not None)
        )
        raise NetworkError(
            f"pack cannot honour {given} for a {type(source).__name__}, which has no guide to pack anew "
            "from: give it in the recipe (metadata: to the call that compressed)."
        )
    coded = guide.harden(_dtype("codebook_dtype", options["codebook_dtype"] or source.recipe.codebook_dtype))
    dense = hard_network(_with_leftovers(source, options["leftover_dtype"]), coded).eval()
    about = with_metadata(getattr(source.network, METADATA), metadata)
    layout = options["layout"] or source.recipe.storage.layout
    return packed_network(dense, coded, layout=layout, leftover_dtype=None, metadata=about), dense


def _with_leftovers(source: Any, leftover_dtype: str | None) -> nn.Module:
    """Return a result's dense network, with what is not compressed rounded to another dtype if one is given."""
    if leftover_dtype is None or leftover_dtype == source.recipe.leftover_dtype:
        return source.hard  # rounded to this very dtype
    whole = dict(source.unrounded.named_modules())
    # Inputs may have kept a norm from being folded: they are gone, but the hard network shows which.
    same = [name for name, module in source.hard.named_modules() if _same_buffers(module, whole[name])]
    return shipped_network(source.unrounded, source.model.site_values(), leftover_dtype, kept=same)


def _same_buffers(first: nn.Module, second: nn.Module) -> bool:
    """Return whether a norm's statistics are still there: what inputs have kept from being folded."""
    pairs = zip(first.buffers(recurse=False), second.buffers(recurse=False), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def _dtype(argument: str, name: str) -> torch.dtype:
    if name not in ("float16", "float32"):
        raise NetworkError(f"{argument} is {name!r}, but should be 'float16' or 'float32'.")
    return getattr(torch, name)


def _network_of(guide: PosteriorGuide) -> nn.Module:
    net = getattr(guide.model, "net", None)
    if not isinstance(net, nn.Module):
        raise NetworkError(
            f"The guide's model is a {type(guide.model).__name__} without a network 'net' to pack: use "
            "guide.harden() and packed_network(net, coded) with a network of your own."
        )
    return net
