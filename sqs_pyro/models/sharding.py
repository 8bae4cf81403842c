"""Sites divided among ranks: each keeps some rows of every weight, and computes with those.

A rank's Pyro model is that of its rows: what is sampled, priors and KL are local, and nothing is sent for them.
Only the network that runs has whole weights, one layer at a time
(:class:`~sqs_pyro.distributions.sharded_tensor.ShardedTensor`).
Each parameter is a ``DTensor`` of torch.distributed, as those of FSDP2 are: optimizers, ``clip_grad_norm_`` and
``torch.distributed.checkpoint`` know them.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from sqs_pyro.distributions.local_draw import when_used
from sqs_pyro.errors import NetworkError
from sqs_pyro.models.network_prior import FixedPrior

if TYPE_CHECKING:  # heavy, and of no use to one rank
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Network = TypeVar("Network", bound=nn.Module)


def shard_sites(model: "Network", mesh: "DeviceMesh") -> "Network":
    """Divide the weights of a network's sites among ranks, in place, before a guide is made.

    A guide of the model is divided likewise, one site after the other, and gradients are those of the mean of the
    ranks' losses. What is no site (biases, norms, embeddings; with ``include=".*"`` nothing) stays whole on each
    rank, and is given rank 0's values.

    Args:
        model: a :class:`~sqs_pyro.models.BayesianNetwork`, the same on each rank.
        mesh: of one dimension, of ``torch.distributed.device_mesh.init_device_mesh``.

    Returns:
        The model.

    Raises:
        NetworkError: it is no such model, or divided already; its prior or likelihood needs all weights of a layer
            or has parameters of its own; or the mesh has other than one dimension.
    """
    own: Any = model
    _check(own, mesh)
    # Rank 0's values are everybody's: nothing depends on whether ranks have begun alike.
    sites, local = frozenset(own.site_values()), {}
    for name in [name for name, _ in own.net.named_parameters()]:
        weight, is_site = own.net.get_parameter(name), name in sites
        if is_site or weight.requires_grad:
            divided = distributed(weight, mesh, rows=is_site)
            _put(own.net, weight, divided)
            if is_site:
                local[name] = divided.to_local().shape
    own.prior.take_shapes(local)
    own.mesh = mesh
    return model


def distributed(parameter: Tensor, mesh: "DeviceMesh", rows: bool) -> Any:
    """Return a parameter as ranks keep it: rows along its first dimension, or whole on each; rank 0's values."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placed = distribute_tensor(parameter.detach(), mesh, [Shard(0) if rows else Replicate()])
    return nn.Parameter(placed, requires_grad=parameter.requires_grad)


def whole_when_used(net: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a network's tensors, those of which this rank has rows as what gathers them when they are used."""
    own: dict[str, Any] = dict(net.named_parameters())
    return {
        name: when_used(value, own[name]) if name in own and _has_rows(own[name]) else value
        for name, value in tensors.items()
    }


def mean_over_ranks(value: Any) -> Tensor:
    """Return what is whole on each rank; its gradient is the mean of the ranks', each with its own minibatch."""
    size = value.device_mesh.size()
    found = sum_over_ranks(value)
    if found.requires_grad:
        found.register_hook(lambda grad: grad / size)
    return found


def sum_over_ranks(value: Any) -> Tensor:
    """Return what is whole on each rank; its gradient is the sum of the ranks', each with rows of its own."""
    from torch.distributed.tensor import Partial

    # To where it is already, whose backward pass adds up what `to_local` calls parts.
    same: DTensor = value.redistribute(placements=value.placements)
    return same.to_local(grad_placements=[Partial()])


def added_over_ranks(values: Tensor, mesh: "DeviceMesh") -> Tensor:
    """Return the sum over ranks of what is of their rows; its gradient is that of the own part."""
    from torch.distributed.tensor import DTensor, Partial

    # What is a part of a sum is added up; backwards each part has the sum's gradient.
    return DTensor.from_local(values, mesh, [Partial()], run_check=False).full_tensor()


def gathered_over_ranks(value: Tensor, mesh: "DeviceMesh") -> Tensor:
    """Return a tensor of every rank, ``[ranks, ...]``, in their order: sums of it are the same on each."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(value[None].contiguous(), mesh, [Shard(0)], run_check=False).full_tensor()


def _has_rows(parameter: Any) -> bool:
    return any(placement.is_shard() for placement in getattr(parameter, "placements", ()))


def _put(net: nn.Module, old: Tensor, new: nn.Parameter) -> None:
    """Put a parameter in all places of another one."""
    for module in net.modules():
        for name, held in module._parameters.items():
            if held is old:
                module._parameters[name] = new


def _check(model: Any, mesh: "DeviceMesh") -> None:
    if not hasattr(model, "site_values") or not hasattr(model, "prior"):
        raise NetworkError(
            f"shard_sites was given a {type(model).__name__}, but divides the sites of a BayesianNetwork: give it "
            "before a guide is made of it."
        )
    if mesh.ndim != 1:
        raise NetworkError(
            f"shard_sites was given a mesh of {mesh.ndim} dimensions, but rows are divided along one: give "
            "mesh['name'] of the dimension."
        )
    if model.mesh is not None:
        raise NetworkError("The model's sites are divided among ranks already: call shard_sites once.")
    if not isinstance(model.prior, FixedPrior) or model.hyper_priors() or list(model.prior.parameters()):
        raise NetworkError(
            f"The model's prior is a {type(model.prior).__name__}, which learns from all weights of a layer, but "
            "sites that ranks share need a fixed one: give scale_matched_prior(), or a distribution."
        )
    if isinstance(model.likelihood, nn.Module) and list(model.likelihood.parameters()):
        raise NetworkError(
            f"The model's likelihood is a {type(model.likelihood).__name__} with parameters, whose gradients are "
            "not added up over ranks yet: give one without, such as a Gaussian of a fixed width."
        )
