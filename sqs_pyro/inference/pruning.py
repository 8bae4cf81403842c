"""Which weights are zero, and when: a cubic schedule that ends at the exact target."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from sqs_pyro.arguments import is_positive, is_whole
from sqs_pyro.distributions.sharded_tensor import anywhere
from sqs_pyro.errors import ArgumentError, DivergenceError
from sqs_pyro.inference.largest import keep_largest


@dataclass(frozen=True)
class PruningSchedule:
    """Non-zero rate over steps: 1 at first, then falling with the cube of the time left, then the target.

    ``rate(t) = target + (1 - target) (1 - progress)³`` with progress running from 0 to 1 between ``start`` and
    ``end`` (Zhu & Gupta 2017). The masks at the end keep exactly ``round(target · weights)`` weights.

    Args:
        target: final non-zero rate ρ in (0, 1].
        total_steps: number of training steps.
        start, end: fractions of ``total_steps`` between which the rate falls.
        every: steps between two renewals of the masks.
        scope: ``"global"`` compares saliencies across layers (one threshold), ``"layer"`` keeps the same rate
            in each layer.

    Raises:
        ArgumentError: an impossible value.
    """

    target: float
    total_steps: int
    start: float = 0.05
    end: float = 0.5
    every: int = 20
    scope: str = "global"

    def __post_init__(self) -> None:
        if not (is_positive(self.target) and self.target <= 1):
            raise ArgumentError(f"The target non-zero rate is {self.target!r}, but must be above 0 and at most 1.")
        begins = is_positive(self.start) or self.start == 0
        if not (begins and is_positive(self.end) and self.start < self.end <= 1):
            raise ArgumentError(
                f"Pruning starts at {self.start!r} and ends at {self.end!r} of the steps, but must satisfy "
                "0 <= start < end <= 1."
            )
        if not (is_whole(self.total_steps, 1) and is_whole(self.every, 1)):
            raise ArgumentError(
                f"total_steps={self.total_steps!r} and every={self.every!r} must both be at least 1 step."
            )
        if self.scope not in ("global", "layer"):
            raise ArgumentError(f"Pruning scope {self.scope!r} is unknown: use 'global' or 'layer'.")

    @property
    def end_step(self) -> int:
        """The step from which the rate is the target."""
        return max(1, round(self.end * self.total_steps))

    def rate(self, step: int) -> float:
        """Return the non-zero rate at a step."""
        if step >= self.end_step:  # first: rounding may put the end before the start
            return self.target
        start = self.start * self.total_steps
        progress = max((step - start) / max(self.end_step - start, 1e-9), 0.0)  # 0 before the start
        return self.target + (1 - self.target) * (1 - progress) ** 3

    def due(self, step: int) -> bool:
        """Return whether the masks are to be renewed at this step."""
        # The end whatever `every` is: masks there are final, of exactly the target's size.
        return step == self.end_step or (step < self.end_step and step % self.every == 0 and self.rate(step) < 1)

    def masks(self, saliencies: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return True for the weights to keep: the most salient ones, exactly as many as the rate says.

        Args:
            saliencies: for each site a tensor of its weight's shape; higher is kept longer. Ties are broken by
                position, so that the count is exact. All may be divided among ranks by rows, as ``DTensor``s; then
                so are the masks, which are the same.
            step: the current step.

        Raises:
            DivergenceError: saliencies hold NaN, which no order has a place for.
        """
        for name, values in saliencies.items():
            if anywhere(values.isnan()):
                raise DivergenceError(
                    f"The saliencies of '{name}' hold NaN, so that nothing says which weights to keep: training "
                    "has diverged, or what they were made of; lower learning_rate or kl_weight."
                )
        rate, names = self.rate(step), list(saliencies)
        compared = [names] if self.scope == "global" else [[name] for name in names]
        keep = [keep_largest([saliencies[name] for name in together], rate) for together in compared]
        return dict(zip(names, chain.from_iterable(keep), strict=True))
