"""Natural-gradient steps for latents, widths and gates, at the cost of Adam.

The dense family ``q = (1-λ) δ₀ + λ N(w, s²)`` is an exponential family: with the natural parameters

    η₁ = logit λ - ½ log(2πs²) - w²/2s²,   η₂ = w/s²,   η₃ = -1/2s²

its expectation parameters are the moments ``m = (λ, λ w, λ (w² + s²))``, and the natural gradient with respect to
η is the gradient with respect to m (Khan and Rue 2023, arXiv 2107.04562). Local reparametrisation reaches the
likelihood through the last two moments only: its gradient with respect to m₁ is 0, whatever the noise, and at the
optimum η₁ is the prior's. Under a slab N(0, σ₀²) this says

    logit λ = logit λ₀ + ½ log(s²/σ₀²) + w²/2s²:

a weight is kept by its evidence. Widths and latents follow IVON (Shen et al. 2024, arXiv 2402.17641): the
precision is an average of curvatures that stays positive, and latents take Newton's steps with momentum.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from sqs_pyro.arguments import is_positive, is_whole
from sqs_pyro.documents import shown
from sqs_pyro.errors import ArgumentError, NetworkError
from sqs_pyro.inference.guides.site import SiteGuide
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide

#: Gates stay within sigmoid(±15), 3e-7 from 0 and 1: beyond, float32 has no 1 - λ to divide by.
_LARGEST_LOGIT = 15.0


class NaturalGradient(PyroOptim):
    """Steps of natural gradients for a guide's latents, widths and gates: ``SVI(model, guide, optim, SQSELBO())``.

    Args:
        guide: in its dense stage, with a width for each weight.
        learning_rate: of latents, in units of Newton's step; 1 goes to the minimum of a quadratic in one step.
        width_rate: ρ, the share of the newest curvature in the precisions, and of a gate's way to its optimum.
        momentum: of latents.
        steps: how many there will be; in the second half of them a rate r falls like ``r / (1 + r k)`` with steps
            k, which makes what Newton's steps come to an average. None keeps the rates.
        gates_from: steps before gates move: a network that has learned nothing has no evidence for its weights.
        others: torch optimizer of all other parameters (norms, biases, noise).
        others_args: its arguments, or a function from a parameter's name to them, as :class:`pyro.optim.PyroOptim`
            has it.

    Raises:
        NetworkError: the guide has no widths to learn.
        ArgumentError: an impossible rate.
    """

    def __init__(
        self,
        guide: SpikeGMMGuide,
        learning_rate: float = 0.1,
        width_rate: float = 0.05,
        momentum: float = 0.9,
        steps: int | None = None,
        gates_from: int = 0,
        others: type[torch.optim.Optimizer] = torch.optim.Adam,
        others_args: dict[str, Any] | Callable[[str], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(others, {"lr": 1e-2} if others_args is None else others_args)
        _check_guide(guide)
        for name, rate in (("learning_rate", learning_rate), ("width_rate", width_rate)):
            if not is_positive(rate) or rate > 1:
                raise ArgumentError(f"{name} is {shown(rate)}, but must be above 0 and at most 1.")
        if not (momentum == 0 or is_positive(momentum)) or momentum >= 1:
            raise ArgumentError(f"momentum is {shown(momentum)}, but must be at least 0 and below 1.")
        if steps is not None and not is_whole(steps, 1):
            raise ArgumentError(f"steps is {shown(steps)}, but must be at least 1; None keeps the rates.")
        if not is_whole(gates_from, 0):
            raise ArgumentError(f"gates_from is {shown(gates_from)}, but must be a number of steps.")
        self.guide = guide
        self.learning_rate, self.width_rate, self.momentum, self.steps = learning_rate, width_rate, momentum, steps
        self.gates_from, self.taken = gates_from, 0
        self._velocities: dict[str, Tensor] = {}  # by site

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Take a step along the gradients of these parameters."""
        _check_guide(self.guide)  # which may have been coded since the last step
        others = {id(parameter): parameter for parameter in params}
        for name, site in self.guide.site_guides().items():
            for parameter in _of(site):
                others.pop(id(parameter), None)
            if site.latent_unconstrained.grad is not None:
                with torch.no_grad():
                    self._step(name, site)
        self.taken += 1
        super().__call__(list(others.values()), *args, **kwargs)

    def _rate(self, highest: float) -> float:
        """Return a rate at the coming step."""
        falling = 0 if self.steps is None else max(0, self.taken - self.steps // 2)
        return highest / (1 + highest * falling)

    def _step(self, name: str, site: SiteGuide) -> None:
        latent, log_scale, logit = _of(site)
        rate = self._rate(self.width_rate)
        gate = logit.sigmoid()
        square = (2 * log_scale).exp()  # s²
        # Pruned weights have no gradient; the others' are divided by what made them small.
        to_latent = _grad(latent) / gate  # ∂F/∂w / λ
        to_log_scale = _grad(log_scale) / gate  # 2 s² ∂F/∂s² / λ
        to_gate = _grad(logit) / (gate * (1 - gate))  # ∂F/∂λ
        # ∂F/∂m₁ = ∂F/∂λ - w/λ ∂F/∂w + (w² - s²)/λ ∂F/∂s²: the likelihood's noise is in all three and cancels
        first = to_gate - latent * to_latent + 0.5 * (latent.square() / square - 1) * to_log_scale
        best = logit - _log_normaliser(latent, square) - first  # η₁ where that gradient is 0
        # 1/s² times 1 + a + a²/2 > 0: an average of curvatures that no noise makes negative
        step = rate * to_log_scale
        log_scale -= 0.5 * torch.log1p(step + 0.5 * step.square())
        square = (2 * log_scale).exp()
        velocity = self._velocities.setdefault(name, torch.zeros_like(latent))
        velocity.lerp_(to_latent, 1 - self.momentum)
        latent -= self._rate(self.learning_rate) * square * velocity
        if self.taken >= self.gates_from:
            logit.lerp_(best + _log_normaliser(latent, square), rate).clamp_(-_LARGEST_LOGIT, _LARGEST_LOGIT)

    def get_state(self) -> dict[str, Any]:
        """Return velocities and steps taken beside the state of the other parameters' optimizers."""
        return {**super().get_state(), "natural_gradient": (self.taken, dict(self._velocities))}

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`get_state` has returned."""
        others = dict(state_dict)
        self.taken, self._velocities = others.pop("natural_gradient")
        super().set_state(others)


def _check_guide(guide: SpikeGMMGuide) -> None:
    if not isinstance(guide, SpikeGMMGuide):
        raise NetworkError(f"NaturalGradient was given a {type(guide).__name__}, but steps a SpikeGMMGuide.")
    if guide.stage != "dense" or not all(site.learns_widths for site in guide.site_guides().values()):
        raise NetworkError(
            "NaturalGradient steps along a width for each weight, which this guide does not have: make it with "
            "SpikeGMMGuide(model), and take another optimizer once it is coded."
        )
    if guide.gate_temperature != 1:
        raise NetworkError(
            f"NaturalGradient takes gates for sigmoid(g), but the guide's gate_temperature is "
            f"{guide.gate_temperature}: leave it at 1."
        )


def _of(site: SiteGuide) -> tuple[Tensor, Tensor, Tensor]:
    """Return w, log s and logit λ, as they are stepped along."""
    return site.latent_unconstrained, site.latent_scale_unconstrained, site.gate_logit_unconstrained


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _log_normaliser(latent: Tensor, square: Tensor) -> Tensor:
    """Return ``½ log(2πs²) + w²/2s²``, what logit λ has beside η₁."""
    return 0.5 * (math.log(2 * math.pi) + square.log() + latent.square() / square)
