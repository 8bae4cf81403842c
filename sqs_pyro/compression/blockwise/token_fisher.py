r"""What the calibration says of matrices with a row for each token: an embedding, and a head.

Both have the form of :class:`~sqs_pyro.compression.blockwise.laplace.LayerLikelihood`, ``Σ_v g_v δ_vᵀ H δ_v``:

* **Embedding.** Row v is the output at each place where token v is read. So g_v is how often that is, and H the
  Fisher information of the embedding's outputs, a mean over places.
* **Head.** Of logits z with ``p = softmax(z)`` the Fisher information of z_v is ``p_v (1 - p_v)``, known without
  a draw; row v thus has ``Σ_t p_tv (1 - p_tv) h_t h_tᵀ``. One H serves all rows: with
  ``m_t = Σ_v p_tv (1 - p_tv)`` it is ``Σ_t m_t h_t h_tᵀ`` over the mean of m, and g_v the mean of
  ``p_tv (1 - p_tv)``. Summed over the rows that is exact; places where the network is sure count little.

Of a vocabulary of 50,000 a calibration of 20,000 tokens shows a tenth. Tokens that it lacks are not absent from
what will be read: frequencies have a Dirichlet prior, with ``prior`` a pseudo-count for each token, and g_v is the
posterior's mean. At 1/2, Jeffreys' prior, the mean is the estimate of Krichevsky and Trofimov, whose regret in
log-loss is asymptotically minimax whatever text comes: an unseen token counts a third of one that was seen once.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sqs_pyro.compression.blockwise.laplace import LayerLikelihood
from sqs_pyro.compression.blockwise.shares import Shares
from sqs_pyro.errors import NetworkError

_LOGITS = 1 << 24  # at once
_LEAST = 1e-30  # of a row's weight, which must not be 0


def expected_counts(counts: Tensor, prior: float) -> Tensor:
    """Return how often each token is expected in a text as long as the calibration: the posterior's mean.

    Args:
        counts: how often it was read, ``[V]``.
        prior: pseudo-count of each token.

    Returns:
        float64 ``[V]``, with the sum of ``counts``.
    """
    total = float(counts.sum())
    return (counts.double() + prior) * (total / (total + prior * len(counts)))


def embedding_likelihood(
    weight: Tensor, counts: Tensor, prior: float, outputs: Tensor | None = None
) -> LayerLikelihood:
    """Return the likelihood of an embedding.

    Args:
        weight: ``[V, D]``.
        counts: how often each token was read, ``[V]``.
        prior: pseudo-count of each token.
        outputs: Fisher information of the outputs, ``[D, D]``, a mean over places; without it outputs are observed
            with a noise as large as they are.
    """
    mean = weight.detach().float()
    expected = expected_counts(counts.to(mean.device), prior)
    if outputs is None:
        size = float((expected @ mean.double().square().mean(1)) / expected.sum()) or 1.0  # an embedding of zeros
        outputs = torch.eye(mean.shape[1]) / size
    return LayerLikelihood(mean, outputs.to(mean), expected.to(mean))


@dataclass(frozen=True, eq=False)
class HeadFisher:
    """Sums over places of what reaches a head and what it says.

    Attributes:
        rows: ``Σ_t p_tv (1 - p_tv)``, ``[V]``.
        cross: ``Σ_t m_t h_t h'_tᵀ``, ``[D, D]``, of inputs before and after compression.
        curvature: ``Σ_t m_t h'_t h'_tᵀ``, ``[D, D]``.
        places: how many there are.
    """

    rows: Tensor
    cross: Tensor
    curvature: Tensor
    places: int

    @property
    def mass(self) -> float:
        """m̄, the mean of m."""
        return float(self.rows.sum()) / self.places

    def likelihood(self, weight: Tensor, prior: float) -> LayerLikelihood:
        """Return the likelihood of the head's weight ``[V, D]``, with the frequencies' prior.

        A pseudo-token counts as much as a place does on average: ``prior`` times m̄.
        """
        mean, mass = weight.detach().float(), self.mass
        # A network that is sure of everything says nothing of its head; H stays finite.
        curvature = self.curvature / mass if mass else self.curvature
        rows = (self.rows.double() + prior * mass) / (self.places + prior * len(self.rows))
        return LayerLikelihood(mean, curvature.to(mean), rows.clamp(min=_LEAST).to(mean))

    def cross_moment(self) -> Tensor:
        """Return ``cross`` in the units of the likelihood's curvature."""
        return self.cross / self.mass if self.mass else self.cross


@torch.no_grad()
def head_fisher(
    head: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]], shares: Shares | None = None
) -> HeadFisher:
    """Sum up what a head's inputs say of its weight.

    Args:
        head: the module that gives the logits of a softmax, ``[..., V]``.
        pairs: inputs h of the original network and h' of the compressed one, ``[..., D]``, of the same places; h'
            may be h itself. Probabilities are those of the original.
        shares: the minibatches, of which ``pairs`` are this rank's own; if left out, there is no other rank.

    Raises:
        NetworkError: there is no pair.
    """
    left = iter(pairs)
    if shares is None:
        found = _sums(head, left)
    else:
        found = shares.sums(lambda part: _sums(head, itertools.islice(left, part.stop - part.start)))
    rows, cross, curvature, places = found
    return HeadFisher(rows.float().cpu(), cross.cpu(), curvature.cpu(), int(places))


def _sums(head: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return rows, cross, curvature and places of :class:`HeadFisher`."""
    rows = cross = curvature = None
    places = 0
    for before, after in pairs:
        h, seen = (value.reshape(-1, value.shape[-1]) for value in (before, after))
        probabilities = head(h[:1]).shape[-1]
        step = max(1, _LOGITS // probabilities)
        for start in range(0, len(h), step):  # logits of all places would be the largest tensor of all
            part, other = h[start : start + step], seen[start : start + step].float()
            p = head(part).float().softmax(-1)  # [n, V]
            information = p * (1 - p)
            weighted = information.sum(1, keepdim=True) * other  # m h'
            found = information.sum(0).double(), part.float().T @ weighted, other.T @ weighted
            if rows is None or cross is None or curvature is None:
                rows, cross, curvature = found
            else:
                rows, cross, curvature = rows + found[0], cross.add_(found[1]), curvature.add_(found[2])
        places += len(h)
    if rows is None or cross is None or curvature is None:
        raise NetworkError("The information of a head needs at least one minibatch of its inputs.")
    return [rows, cross, curvature, torch.tensor(places)]
