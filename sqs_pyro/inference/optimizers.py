"""Which parameter learns how fast in compression."""

from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.inference.guide import SpikeGMMGuide
from sqs_pyro.inference.recipe import CompressionRecipe


def optimizers(model: nn.Module, guide: SpikeGMMGuide, recipe: CompressionRecipe) -> list[torch.optim.Optimizer]:
    """SGD or Adam for latents and for the parameters of ``model`` that learn, Adam for all else that learns:
    codebooks, gates, the prior's parameters.

    Every group has a key ``highest_lr``, to which a schedule's factor applies. Parameters that do not require
    a gradient are left out; gates do not from here on, if the recipe gives them no learning rate.
    """
    sites = guide.site_guides().values()
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    leftovers = [p for name, p in learning if not name.startswith("prior.")]
    prior = [p for name, p in learning if name.startswith("prior.")] + list(guide.inclusions.parameters())
    latents = [site.latent_unconstrained for site in sites]
    groups: list[dict[str, Any]] = (
        [{"params": prior, "highest_lr": recipe.codebook_learning_rate}] if prior else []
    )
    for site in sites:
        step = recipe.codebook_learning_rate * _size(site.latent)
        groups.append({"params": [site.loc_unconstrained], "highest_lr": step})
        shape = [p for p in (site.scale_unconstrained, site.mixing_logits_unconstrained) if p.requires_grad]
        if shape:
            groups.append({"params": shape, "highest_lr": recipe.codebook_learning_rate})
        if recipe.gate_learning_rate > 0:
            groups.append({"params": [site.gate_logit_unconstrained], "highest_lr": recipe.gate_learning_rate})
        else:
            site.gate_logit_unconstrained.requires_grad_(False)
    first = (_adam if recipe.optimizer == "adam" else _sgd)(latents + leftovers, recipe)
    return [first, torch.optim.Adam(groups, lr=recipe.codebook_learning_rate, fused=True)]


def _sgd(parameters: list[Tensor], recipe: CompressionRecipe) -> torch.optim.Optimizer:
    groups = [
        {
            "params": [p for p in parameters if (p.dim() > 1) == decayed],
            "weight_decay": recipe.weight_decay * decayed,
            "highest_lr": recipe.learning_rate,
        }
        for decayed in (True, False)
    ]
    return torch.optim.SGD(
        groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=True
    )


def _adam(parameters: list[Tensor], recipe: CompressionRecipe) -> torch.optim.Optimizer:
    """Decay is decoupled and in units of the learning rate as the recipe gives it, as SGD's is."""
    groups = [
        {
            "params": [p],
            "weight_decay": recipe.weight_decay / _size(p) if p.dim() > 1 else 0.0,
            "highest_lr": recipe.learning_rate * _size(p),
        }
        for p in parameters
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(recipe.momentum, 0.999), fused=True)


def _size(value: Tensor) -> float:
    """Root mean square: Adam's step has the size of its learning rate, so that it is given in units of this."""
    return float(value.detach().square().mean().sqrt()) or 1.0
