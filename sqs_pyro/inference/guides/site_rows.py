"""A site of which this rank has some rows: the same parameters and distribution, of fewer weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import transform_to

from sqs_pyro.distributions.kmeans import Clustering, kmeans_1d
from sqs_pyro.distributions.sharded_tensor import as_rows
from sqs_pyro.errors import NetworkError
from sqs_pyro.inference.guides.site import SiteGuide
from sqs_pyro.inference.guides.windows import PerWeight
from sqs_pyro.models.sharding import distributed, gathered_over_ranks, sum_over_ranks
from sqs_pyro.networks.weight_scale import weight_scale
from sqs_pyro.packing import CodedTensor

_BUFFERS = ("mask", "codes")  # of single weights


class SiteRows(SiteGuide):
    """The variational parameters of a site's rows on one rank.

    Each parameter is a ``DTensor``: rows of what is of single weights (and of codebooks of channels), the whole of
    what is a layer's. Attributes of :class:`SiteGuide` are this rank's part; ``shape`` and ``num_groups`` are of
    its rows.
    """

    @classmethod
    def keep(cls, site: SiteGuide, mesh: Any) -> "SiteRows":
        """Return the rows of a site that this rank keeps; the site is changed in place.

        Args:
            site: whole, the same on each rank.
            mesh: of one dimension.

        Raises:
            NetworkError: its windows, groups, zeros or grid need all weights of the layer.
        """
        _check(site, mesh.size())
        by_channel = site.num_groups > 1
        codebook = ("loc", "scale", "mixing_logits")
        for name, parameter in site._parameters.items():
            assert parameter is not None
            rows = by_channel or name.removesuffix("_unconstrained") not in codebook
            site._parameters[name] = distributed(parameter, mesh, rows)
        # Codes in the weight's shape: rows of it are what a rank has, also where they do not divide evenly.
        for name in _BUFFERS:
            site._buffers[name] = distributed(getattr(site, name).view(site.shape), mesh, rows=True).detach()
        site.__class__ = cls
        assert isinstance(site, SiteRows)
        site.shape = site.latent.shape
        site.num_groups = len(site.loc)
        return site

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name.endswith("_unconstrained") or not hasattr(value, "placements"):
            return value
        own = value.to_local() if value.placements[0].is_shard() else sum_over_ranks(value)
        return own.view(self.num_groups, -1) if name == "codes" else own

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _BUFFERS and not hasattr(value, "placements"):
            value = as_rows(value.view(self.shape), self._buffers[name])
        if name not in self._pyro_params:
            super().__setattr__(name, value)
            return
        # In place: a DTensor's `data` is not what it computes with.
        like: Any = self._parameters[f"{name}_unconstrained"]
        with torch.no_grad():
            like.to_local().copy_(transform_to(self._pyro_params[name][0]).inv(value.detach()))

    @property
    def size(self) -> Tensor:
        """Root mean square of all ranks' latents, as of :func:`~sqs_pyro.networks.weight_scale.weight_scale`."""
        own = self.latent.detach().double().square()
        squares, number = self.gathered(torch.stack([own.sum(), torch.ones_like(own).sum()])).sum(0)
        return weight_scale((squares / number).sqrt().to(self.latent.dtype).expand(1, *self.latent.shape[1:]))

    @property
    def num_codebooks(self) -> int:
        """How many groups there are, those of other ranks' rows included."""
        like: Any = self._parameters["scale_unconstrained"]
        return len(like)

    @property
    def shares_codebook(self) -> bool:
        """Whether other ranks have weights of the groups that are here."""
        return not self._by_channel

    def gathered(self, value: Tensor) -> Tensor:
        """Return a tensor of every rank, ``[ranks, ...]``."""
        return gathered_over_ranks(value, self._like.device_mesh)

    def placed(self, values: Tensor) -> Any:
        """Return values of this rank's weights as rows of a ``DTensor``."""
        return as_rows(values, self._like)

    def beside(self, value: Tensor) -> Tensor:
        """Return rank 0's value that broadcasts against all weights, or the rows of it that are of this rank's."""
        rows = value.dim() == self._like.dim() and len(value) == len(self._like)
        own: Tensor = distributed(value.to(self.latent), self._like.device_mesh, rows).to_local()
        return own

    def fitted(self, values: Tensor, weights: Tensor) -> Clustering:
        """Return codebooks fitted to the values of all ranks that are in a group."""
        if self._by_channel:  # whose weights are all this rank's
            return super().fitted(values, weights)
        return kmeans_1d(values, self.num_components, weights, gathered=self.gathered)

    @property
    def _like(self) -> Any:
        return self._parameters["latent_unconstrained"]

    @property
    def _by_channel(self) -> bool:
        like: Any = self._parameters["scale_unconstrained"]
        return bool(like.placements[0].is_shard())

    def _coded(self, mask: Tensor, codes: Tensor, loc: Tensor, codebook_dtype: torch.dtype) -> CodedTensor:
        """Return hard weights, all rows of them, on every rank: of two bytes a weight."""
        if self._by_channel:
            loc = as_rows(loc, self._parameters["scale_unconstrained"]).full_tensor()
        mask, codes = (self.placed(value).full_tensor() for value in (mask, codes))
        return super()._coded(mask, codes, loc, codebook_dtype)


def _check(site: SiteGuide, ranks: int) -> None:
    """Raise a :class:`NetworkError` if what a site computes needs all weights of the layer."""
    name = site.site_name
    if not isinstance(site.windows, PerWeight):
        raise NetworkError(
            f"windows is {type(site.windows).__name__}, whose means are of all weights of '{name}', but ranks "
            "have some each: use PerWeight()."
        )
    if site.zero != "gate":
        raise NetworkError(
            f"zero is {site.zero!r}, which compares all weights of '{name}', but ranks have some each: use 'gate'."
        )
    if site.grid != "free":
        raise NetworkError(
            f"grid is {site.grid!r}, whose step is fitted to all weights of '{name}', but ranks have some each: "
            "use 'free'."
        )
    by_channel = site.num_groups == len(site.latent) > 1
    if site.num_groups > 1 and not by_channel:
        raise NetworkError(
            f"groups of '{name}' are {site.num_groups} tiles, which ranks may cut: use 'layer' or 'channel'."
        )
    # As torch divides rows: of 5 on 4 ranks three have 2, 2 and 1.
    if by_channel and -(-site.num_groups // -(-site.num_groups // ranks)) < ranks:
        raise NetworkError(
            f"'{name}' has {site.num_groups} channels, which leave some of {ranks} ranks without a codebook: use "
            "groups='layer', or fewer ranks."
        )


#: Bytes of a weight between steps: pretrained value, latent, gate; mask and code.
_HELD = 3 * 4 + 2
#: Of a weight when the network's backward pass ends: λ; whether its gate is open; gradients of latent, λ and draw.
_KEPT = 4 + 1 + 3 * 4
#: Of a weight of the site whose KL is computed anew: tables over components, and numbers beside them.
_TABLES, _BESIDE = 3 * 4, 4 * 4
#: Of a weight of the layer that runs, which is whole: itself, its gradient, and what of it is sent.
_WHOLE = 3 * 4


def planned_bytes(shapes: Sequence[torch.Size], ranks: int, num_components: int, moments: int = 2) -> int:
    """Return how much memory a rank's step takes of sites that ranks share, at its highest.

    Counted are a guide's sites while codes follow latents by hard values, and what an optimizer has of them; not
    activations, what is no site, and libraries.

    Args:
        shapes: of the sites' weights.
        ranks: how many.
        num_components: K.
        moments: numbers of a parameter that the optimizer keeps, 2 of Adam.
    """
    # As torch divides rows: the first rank has the most.
    rows = [-(-shape[0] // ranks) * shape[1:].numel() for shape in shapes]
    held = sum(rows) * (_HELD + 2 * 4 * moments + _KEPT)
    return held + max(rows) * (_TABLES * num_components + _BESIDE) + max(map(torch.Size.numel, shapes)) * _WHOLE
