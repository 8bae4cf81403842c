"""An embedding and a head coded under the learned prior, with what the network says of their rows."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from sqs_pyro.compression.blockwise.bit_budget import LayerRate
from sqs_pyro.compression.blockwise.channel_scales import in_units_of, scale_bits
from sqs_pyro.compression.blockwise.coded_weight import coded_weight, scales_of
from sqs_pyro.compression.blockwise.laplace import LayerLikelihood
from sqs_pyro.compression.blockwise.recipe import ROUNDING, BlockwiseRecipe
from sqs_pyro.compression.blockwise.rounding import rounded_weight
from sqs_pyro.compression.blockwise.shares import Shares
from sqs_pyro.compression.blockwise.store import FinishedTable, Plan, TableRecord
from sqs_pyro.compression.blockwise.token_fisher import HeadFisher, embedding_likelihood, head_fisher
from sqs_pyro.compression.blockwise.vocabulary import Vocabulary
from sqs_pyro.networks.block_stack import BlockStack


class Tables:
    """Likelihoods and codings of a network's embedding and head; its weights must be held.

    Args:
        stack: the network and its blocks.
        vocabulary: which of the two are compressed.
        recipe: what to do.
        minibatches: of the calibration, this rank's own.
        shares: which these are.
        counts: how often all of them read each token, ``[V]``.
    """

    def __init__(
        self,
        stack: BlockStack,
        vocabulary: Vocabulary,
        recipe: BlockwiseRecipe,
        minibatches: Sequence[Any],
        shares: Shares,
        counts: Tensor,
    ) -> None:
        self.stack, self.vocabulary, self.recipe = stack, vocabulary, recipe
        self.minibatches, self.shares, self.counts = minibatches, shares, counts

    def embedding_likelihood(self, plan: Plan | None, head: HeadFisher | None) -> LayerLikelihood:
        """Return that of the embedding, of all its rows.

        Args:
            plan: with the information of its outputs; without one these have a noise as large as they are.
            head: of a head that shares it, which reads it, too.
        """
        path, prior = str(self.vocabulary.embedding), self.recipe.token_prior
        weight, outputs = self._weight(path), None if plan is None else plan.importance[path]
        own = embedding_likelihood(weight, self.counts, prior, outputs).damped(self.recipe.damping)
        if self.vocabulary.tied_head is None or head is None:
            return own
        return own.plus(head.likelihood(weight, prior).damped(self.recipe.damping))

    def head_likelihood(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> LayerLikelihood:
        """Return that of a head of its own, which sees what the compressed blocks give; of this rank's rows.

        Args:
            before: hidden states behind the original blocks, one of each own minibatch.
            after: those behind the compressed ones.
        """
        path = str(self.vocabulary.head)
        adapts = self.recipe.adapt_inputs
        fisher = self.head_fisher(path, before if adapts else after, after)
        weight = self._weight(path)
        plain = fisher.likelihood(weight, self.recipe.token_prior).of_rows(self._rows(weight))
        own = plain.damped(self.recipe.damping)
        if not adapts:
            return own
        ridge = own.curvature - plain.curvature  # pulls towards the weight itself
        return own.given_inputs(fisher.cross_moment().to(ridge) + ridge, own.curvature)

    def head_fisher(self, path: str, before: Sequence[Tensor], after: Sequence[Tensor]) -> HeadFisher:
        """Return what a head's inputs say of its weight, from hidden states as :meth:`head_likelihood`."""
        head = self.stack.net.get_submodule(path)

        def pairs() -> Iterable[tuple[Tensor, Tensor]]:
            for inputs, hidden, seen in zip(self.minibatches, before, after, strict=True):
                x = self.stack.exit_input(inputs, hidden, head)
                yield x, (x if seen is hidden else self.stack.exit_input(inputs, seen, head))

        return head_fisher(head, pairs(), self.shares)

    def sizes(self) -> dict[str, int]:
        """Return how many weights each has, by path."""
        return {path: self._weight(path).numel() for path in self.vocabulary.paths}

    def rate(self, path: str, plan: Plan, few: bool) -> LayerRate:
        """Return how many bits one takes at any β.

        Args:
            path: which.
            plan: what was found before the first block.
            few: whether values are too few for the grid that bits ask for.
        """
        weight = self._weight(path)
        if path == self.vocabulary.embedding:
            own = self.embedding_likelihood(plan, plan.head)
        else:
            assert plan.head is not None  # of this very head, with the original network's inputs: a forecast
            own = plan.head.likelihood(weight, self.recipe.token_prior).damped(self.recipe.damping)
        scales = self._scales(weight, own.importance)
        precision, extra = own.in_units_of(scales).mean_precision, scale_bits(scales, weight.shape[1])
        # By columns: a stride along the rows might meet the same few inputs in each of them.
        values = self.recipe.components_of(path) if few else None
        return LayerRate.of(in_units_of(scales, weight).T, precision, extra, values)

    def code(self, path: str, own: LayerLikelihood, *, bits: float | None, beta: float | None) -> FinishedTable:
        """Code one of them for so many bits a weight, or at β; all ranks call it together.

        Args:
            path: which.
            own: its likelihood, of all rows or of this rank's own.
            bits: for each weight; or
            beta: β.
        """
        start = time.perf_counter()
        weight = self._weight(path)
        if own.rows is None:
            own = own.of_rows(self._rows(weight))
        values = self.recipe.components_of(path)
        if self.recipe.method in ROUNDING:
            coded, row = rounded_weight(own, self.recipe.method, values)
        else:
            scales = self._scales(weight, own.shares.joined(own.importance))
            coded, row = coded_weight(own, scales, self.recipe, bits=bits, beta=beta, max_components=values)
        return FinishedTable(coded, TableRecord(path, **row, seconds=time.perf_counter() - start))

    def _weight(self, path: str) -> nn.Parameter:
        weight: Any = self.stack.net.get_submodule(path).weight
        return weight

    def _rows(self, weight: Tensor) -> Shares:
        return Shares(len(weight), self.recipe.units, self.shares.ranks)

    def _scales(self, weight: Tensor, importance: Tensor) -> Tensor | None:
        return scales_of(weight, importance, self.recipe, by_size=True)
