"""The layers of a network's blocks that are compressed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sqs_pyro.compression.blockwise.coded_weight import scales_of
from sqs_pyro.compression.blockwise.laplace import Factors, LayerLikelihood, damped
from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.errors import NetworkError

#: Linear layers of a block by name, in groups that share their input, in the order of their calls.
LayerGroups = Callable[[nn.Module], Sequence[Mapping[str, nn.Linear]]]


@dataclass(frozen=True, eq=False)
class BlockLayers:
    """Which layers of blocks are compressed, and in which units.

    Attributes:
        blocks: of the network, through all its stacks.
        paths: of the blocks in the network.
        layer_groups: a block's linear layers.
        recipe: what to do; some layers are skipped.
        preceding: by layers' names, what gives their group its input,
            see :attr:`~sqs_pyro.networks.architecture.Architecture.preceded`.
    """

    blocks: Sequence[nn.Module]
    paths: Sequence[str]
    layer_groups: LayerGroups
    recipe: BlockwiseRecipe
    preceding: Mapping[str, str] = field(default_factory=dict)

    def path(self, i: int, name: str) -> str:
        """Return the name in the network of what is ``name`` in block i."""
        return f"{self.paths[i]}.{name}"

    def groups(self, i: int, block: nn.Module) -> list[dict[str, nn.Linear]]:
        """Return the layers of a block that are compressed, in groups that share their input.

        Args:
            i: the block's number.
            block: it, or what stands for it.
        """
        chosen = [
            {name: layer for name, layer in group.items() if not self.recipe.skips(self.path(i, name))}
            for group in self.layer_groups(block)
        ]
        return [group for group in chosen if group]

    def preceded(self, i: int, block: nn.Module) -> Iterator[tuple[str, Mapping[str, nn.Linear], list[str]]]:
        """Yield what gives groups of layers their input, the whole group, and which of it are compressed.

        Groups are left out of which none are, and those whose inputs are not what there is before them one by one,
        as heads of queries that share values.

        Args:
            i: the block's number.
            block: it.
        """
        for group in self.layer_groups(block):
            chosen = [name for name in group if not self.recipe.skips(self.path(i, name))]
            before = next((self.preceding[name] for name in group if name in self.preceding), None)
            if not chosen or before is None:
                continue
            if len(block.get_parameter(f"{before}.weight")) == group[chosen[0]].in_features:
                yield before, group, chosen

    def every(self, *, skipped: bool = False) -> dict[str, nn.Linear]:
        """Return the layers of all blocks by their names in the network, with those that are skipped if asked."""
        return {
            self.path(i, name): layer
            for i, block in enumerate(self.blocks)
            for group in (self.layer_groups(block) if skipped else self.groups(i, block))
            for name, layer in group.items()
        }

    def likelihoods(
        self, i: int, group: Mapping[str, nn.Linear], curvature: Tensor, importance: Mapping[str, Tensor]
    ) -> dict[str, LayerLikelihood]:
        """Return those of layers that share their input; H, damped, and its factors are one for all of them.

        Args:
            i: the block's number.
            group: the layers by name.
            curvature: H, ``[M, M]``.
            importance: of layers' outputs ``[N]``, by the layers' names in the network; 1 where there is none.
        """
        factors = Factors(damped(curvature, self.recipe.damping))
        found = {}
        for name, layer in group.items():
            g = importance.get(self.path(i, name), torch.ones(layer.out_features))
            mean = layer.weight.detach().float()
            found[name] = LayerLikelihood(mean, factors.curvature, g.to(curvature), known=factors)
        return found

    def scales(
        self, weight: Tensor, importance: Tensor, bits: float, precisions: Tensor | None = None
    ) -> Tensor | None:
        """Return the scales of a layer's outputs, ``[N]``, where they are worth some of its ``bits`` a weight.

        With groups of inputs they are of these, ``[N, B]``.
        """
        few = self.recipe.has_few_components(bits)
        return scales_of(weight, importance, self.recipe, few=few, groups=True, precisions=precisions)


def every_linear(block: nn.Module) -> list[dict[str, nn.Linear]]:
    """Return each linear layer of a block as a group of its own, in the order of the block's modules.

    Raises:
        NetworkError: there is none.
    """
    found = [{name: layer} for name, layer in block.named_modules() if isinstance(layer, nn.Linear)]
    if not found:
        raise NetworkError(f"{type(block).__name__} has no linear layer to compress.")
    return found
