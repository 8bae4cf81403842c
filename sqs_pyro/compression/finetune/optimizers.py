"""Which parameter learns how fast in compression."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide

_OF_THE_MODEL = ("prior.", "likelihood.")


def optimizers(model: nn.Module, guide: SpikeGMMGuide, recipe: CompressionRecipe) -> list[torch.optim.Optimizer]:
    """Make SGD or AdamW for latents and parameters of ``model`` that learn, Adam for all others.

    These are codebooks, gates and parameters of prior and likelihood. Every group has a key ``highest_lr``, to
    which a schedule's factor applies. Parameters that do not require a gradient are left out; gates do not from
    here on, if the recipe gives them no learning rate.
    """
    sites = guide.site_guides().values()
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # Prior and likelihood are modules of the model, but their parameters are learned like the posterior's.
    leftovers = [p for name, p in learning if not name.startswith(_OF_THE_MODEL)]
    own = [p for name, p in learning if name.startswith(_OF_THE_MODEL)] + list(guide.inclusions.parameters())
    decayed = [site.latent_unconstrained for site in sites] + [p for p in leftovers if p.dim() > 1]
    plain = [p for p in leftovers if p.dim() <= 1]
    weights: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": recipe.weight_decay, "highest_lr": recipe.learning_rate},
        {"params": plain, "weight_decay": 0.0, "highest_lr": recipe.learning_rate},
    ]
    of_weights: torch.optim.Optimizer
    fused = not any(p.is_complex() for p in leftovers)  # for which there are no fused kernels
    if recipe.optimizer == "adamw":
        of_weights = torch.optim.AdamW(weights, lr=recipe.learning_rate, fused=fused)
    else:
        of_weights = torch.optim.SGD(
            weights,
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            nesterov=recipe.momentum > 0,  # torch refuses it without momentum
            fused=fused,
        )
    groups: list[dict[str, Any]] = [{"params": own, "highest_lr": recipe.codebook_learning_rate}] if own else []
    for site in sites:
        # Adam's step has the size of its learning rate: give it in units of the layer's weights.
        unit = site.codebook_unit
        groups.append({"params": [site.loc_unconstrained], "highest_lr": recipe.codebook_learning_rate * unit})
        shape = [p for p in (site.scale_unconstrained, site.mixing_logits_unconstrained) if p.requires_grad]
        if shape:  # not under `straight_through`, where no draw depends on them
            groups.append({"params": shape, "highest_lr": recipe.codebook_learning_rate})
        if recipe.gate_learning_rate > 0:
            groups.append({"params": [site.gate_logit_unconstrained], "highest_lr": recipe.gate_learning_rate})
        else:
            site.gate_logit_unconstrained.requires_grad_(False)
    return [of_weights, torch.optim.Adam(groups, lr=recipe.codebook_learning_rate, fused=True)]


def make_gradients_dense(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Turn sparse gradients (of ``nn.Embedding(sparse=True)``) into dense ones, which momentum and decay need."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    parameter.grad = parameter.grad.to_dense()
