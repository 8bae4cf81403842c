"""SVI on one block: a Gaussian likelihood of the original block's output, given the compressed blocks' inputs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pyro
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sqs_pyro.compression.blockwise.channel_scales import in_units_of
from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.compression.blockwise.shares import Shares
from sqs_pyro.compression.precision import training_autocast
from sqs_pyro.distributions import Codebook
from sqs_pyro.inference.elbo import SQSELBO
from sqs_pyro.inference.guides.progress import Stage
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.models import BayesianNetwork
from sqs_pyro.networks.block_stack import BlockArguments, run_block
from sqs_pyro.packing import CodedTensor
from sqs_pyro.packing.coded import rounded_scales, scaled

#: Codewords that a latent would pass in all steps together, were its gradient always of one sign and the rate its
#: highest; as rates fall to nothing, half of them.
_TRAVEL = 2.0


class RelativeOutput(nn.Module):
    """A block whose output is divided by the size of what it should be, token by token.

    A unit-variance Gaussian likelihood of it is one of the output whose noise is as large as the token's hidden
    state: a relative squared error, in which a few tokens with huge states do not drown the others.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, arguments: BlockArguments, size: Tensor) -> Tensor:
        """Args: hidden ``[B, T, D]``; the block's other arguments; size ``[B, T, 1]``. Returns ``[B, T, D]``."""
        return run_block(self.block, hidden, arguments) / size


def token_sizes(target: Tensor) -> Tensor:
    """Return the root mean square of each token's hidden state times √D, ``[..., 1]``."""
    return target.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def relative_error(outputs: Sequence[Tensor], targets: Sequence[Tensor], shares: Shares | None = None) -> float:
    """Return the mean over tokens of ``|output - target|² / |target|²``.

    Args:
        outputs: minibatches ``[..., D]``.
        targets: what they should be.
        shares: the minibatches, of which these are a rank's own; if left out, there is no other rank.
    """

    def total(part: slice) -> Tensor:
        found = torch.zeros(2, dtype=torch.float64)  # errors, and tokens
        for output, target in zip(outputs[part], targets[part], strict=True):
            each = ((output - target) / token_sizes(target)).square().sum(-1)
            found += torch.tensor([float(each.sum(dtype=torch.float64)), each.numel()], dtype=torch.float64)
        return found

    error, tokens = (shares or Shares(len(outputs))).sum(total).tolist()
    return error / tokens


def settle(
    block: nn.Module,
    coded: Mapping[str, CodedTensor],
    minibatches: Sequence[tuple[Tensor, BlockArguments, Tensor]],
    recipe: BlockwiseRecipe,
    seed: int,
) -> dict[str, CodedTensor]:
    """Let a block settle by SVI on its relative output: codes, too, and then codebooks, norms and biases alone.

    Args:
        block: its weights stay, coded or not, its norms and biases are changed in place.
        coded: its compressed weights, by parameter name, which are the block's.
        minibatches: what reaches the block from the compressed blocks before it, the block's other arguments, and
            what the original block gave, ``[B, T, D]``.
        recipe: steps and learning rates.
        seed: of the order of minibatches.

    Returns:
        the coded weights, with new codes and codebooks.
    """
    # Of a generator of its own: which minibatches a block sees does not depend on the blocks before.
    generator = torch.Generator().manual_seed(seed)
    with in_units_of_scales(block, coded) as (codewords, scaled):
        for parameter in block.parameters():
            parameter.requires_grad_(parameter.dim() < 2)  # a weight without codes is one that was to stay
        for layer in scaled.values() if recipe.grid == "free" else ():  # few tokens know little of each output
            layer.log_scales.requires_grad_(False)
        sites = {f"block.{name}": value for name, value in codewords.items()}
        model = BayesianNetwork(
            RelativeOutput(block),
            likelihood="gaussian",
            num_data=recipe.batch_size * len(minibatches),
            # Names, not patterns: exactly these sites, to the letter.
            include=[f"^{site.replace('.', '[.]')}$" for site in sites],
        )
        # Blockwise compression runs without gradients but for here; parameters stay in the modules.
        with pyro.get_param_store().scope(), torch.enable_grad():
            stages: dict[Stage, int] = {"coded": recipe.moving_steps, "frozen": recipe.settle_steps}
            for stage, steps in stages.items():
                if steps:
                    # Zeros move as other codes do, and latents begin at their codewords: the block's weights.
                    guide = SpikeGMMGuide(
                        model,
                        coded=sites,
                        stage=stage,
                        zero="codeword" if stage == "coded" else "gate",
                        estimator="straight_through",
                    )
                    _train(model, guide, minibatches, recipe, steps, generator)
                    sites = guide.harden()
    return {name: with_scales(sites[f"block.{name}"], scaled.get(name)) for name in coded}


def _train(
    model: BayesianNetwork,
    guide: SpikeGMMGuide,
    minibatches: Sequence[tuple[Tensor, BlockArguments, Tensor]],
    recipe: BlockwiseRecipe,
    steps: int,
    generator: torch.Generator,
) -> None:
    # At fixed codes and gates the learned prior's KL is a constant; codes that move are left to the likelihood.
    elbo = SQSELBO(kl_weight=0.0)
    optimizer = settling_optimizer(model, guide, recipe, steps)
    for step in range(steps):
        i = int(torch.randint(len(minibatches), (1,), generator=generator))
        hidden, arguments, target = minibatches[i]
        size = token_sizes(target)
        falling_rates(optimizer, 1 - step / steps)
        optimizer.zero_grad(set_to_none=True)
        with training_autocast(recipe.precision, hidden.device):
            loss = elbo.terms(model, guide, (hidden, arguments, size), target / size).loss
        loss.backward()
        optimizer.step()


class ScaledLinear(nn.Module):
    """``s W x + b``: a linear layer with the weight W in units of scales s, which can learn.

    They are those of its outputs, ``[N]``, or of equal parts of their inputs, ``[N, B]``.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, scales: Tensor) -> None:
        super().__init__()
        # Positive, and steps of any length are relative ones.
        self.log_scales = nn.Parameter(scales.to(linear.weight).log())
        self.weight = nn.Parameter(in_units_of(scales, linear.weight.detach()))
        self.register_parameter("bias", linear.bias)  # the same tensor: what it learns stays in the block

    def forward(self, x: Tensor) -> Tensor:
        """Args: x ``[..., M]``. Returns ``[..., N]``."""
        return nn.functional.linear(x, scaled(self.weight, self.log_scales.exp()), self.bias)

    @property
    def scales(self) -> Tensor:
        """The scales as a file has them: float16 in float32."""
        return rounded_scales(self.log_scales.detach().float().exp()).cpu()


@contextmanager
def in_units_of_scales(
    block: nn.Module, coded: Mapping[str, CodedTensor]
) -> Iterator[tuple[dict[str, CodedTensor], dict[str, ScaledLinear]]]:
    """Put linear layers of ``block`` with scales in units of them, so that their weights are codewords.

    Args:
        block: a network, whose layers come back as they were.
        coded: its compressed weights, by parameter name; those with scales must be of linear layers.

    Yields:
        the compressed weights of those layers, which have no scales; and those layers, by parameter name.
    """
    kept: dict[str, nn.Module] = {}
    scaled: dict[str, ScaledLinear] = {}
    try:
        for name, value in coded.items():
            if value.scales is not None:
                path = name.removesuffix(".weight")
                linear = kept[path] = block.get_submodule(path)
                assert isinstance(linear, nn.Linear)
                scaled[name] = ScaledLinear(linear, value.scales)
                block.set_submodule(path, scaled[name])
        yield {name: replace(value, scales=None) for name, value in coded.items()}, scaled
    finally:
        for path, linear in kept.items():
            block.set_submodule(path, linear)


def with_scales(coded: CodedTensor, layer: ScaledLinear | None) -> CodedTensor:
    """Return codewords, which are all that a guide has known, with the scales of their layer."""
    return coded if layer is None else replace(coded, scales=layer.scales)


def falling_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set learning rates to a share of their highest."""
    for group in optimizer.param_groups:
        # The sum over N examples need not be divided, for Adam knows no size.
        group["lr"] = group["highest_lr"] * share


def settling_optimizer(
    model: BayesianNetwork, guide: SpikeGMMGuide, recipe: BlockwiseRecipe, steps: int
) -> torch.optim.Optimizer:
    """Return Adam, whose steps are as long as the learning rate: given in units of what it moves.

    Args:
        model: the network, whose parameters without codes learn if they require gradients.
        guide: codebooks learn; where codes move, latents.
        recipe: learning rates.
        steps: in which a latent may go from its codeword to the next one and further, see :data:`_TRAVEL`.
    """
    groups = []
    for site in guide.site_guides().values():
        if recipe.grid == "free":  # whole numbers stay: of a uniform grid the scales alone learn
            size = float(site.latent.detach().square().mean().sqrt())
            groups.append({"params": [site.loc_unconstrained], "highest_lr": size * recipe.codebook_learning_rate})
        if guide.stage == "coded":
            rate = _TRAVEL * _neighbours_apart(site.codebook()) / steps
            groups.append({"params": [site.latent_unconstrained], "highest_lr": rate})
    for name, parameter in model.net.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith(".log_scales"):  # scales are of the codewords' kind, and logarithms are relative
            groups.append({"params": [parameter], "highest_lr": recipe.codebook_learning_rate})
            continue
        size = float(parameter.detach().square().mean().sqrt())
        # Biases of zeros have no size of their own.
        groups.append({"params": [parameter], "highest_lr": (size or 1.0) * recipe.leftover_learning_rate})
    return torch.optim.Adam(groups, lr=0.0)


def _neighbours_apart(codebook: Codebook) -> float:
    """Return how far a weight's codeword is from the next one, in the mean of all weights."""
    loc, order = codebook.loc.detach().sort(-1)
    gaps = loc.diff(dim=-1)
    nearest = torch.minimum(pad(gaps, (1, 0), value=torch.inf), pad(gaps, (0, 1), value=torch.inf))
    return float((nearest * codebook.log_mixing.exp().detach().gather(-1, order)).sum(-1).mean())
