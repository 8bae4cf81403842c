"""Packed networks: made from a trained network and its coded weights, saved to a file, loaded from one."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sqs_pyro.errors import NetworkError, PackedFileError
from sqs_pyro.isolation import isolated, lasting_tensors
from sqs_pyro.kernels.assemble import assemble
from sqs_pyro.kernels.described import described_network
from sqs_pyro.kernels.ensemble import PackedEnsemble
from sqs_pyro.kernels.weight import PackedWeight
from sqs_pyro.networks.checks import check_replaceable
from sqs_pyro.packing.coded import CodedTensor
from sqs_pyro.packing.contents import PackedContents, contents_of, pack, pack_draws
from sqs_pyro.packing.file import opened_file, write_packed
from sqs_pyro.packing.finite import check_finite
from sqs_pyro.packing.layouts import PackedTensor
from sqs_pyro.packing.stored import StoredEnsemble, stored_weights
from sqs_pyro.resources import enough_resources


@lasting_tensors()
def packed_network(
    net: nn.Module,
    coded: Mapping[str, CodedTensor | PackedTensor],
    *,
    layout: str = "auto",
    leftover_dtype: str | None = "float16",
    metadata: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return a copy of ``net``, in eval mode, that runs on packed weights.

    Args:
        net: the network; it stays as it is. Its other tensors are taken over.
        coded: the compressed weights by parameter name; of a shared parameter, one of its names. What is
            packed already stays in its layout.
        layout: ``"dense"``, ``"bitmap"``, ``"entropy"``, ``"adaptive"``, ``"structured"``, or ``"auto"`` for the
            smallest of the first three, and for tensors of up to 65,536 weights the fourth.
        leftover_dtype: ``"float16"``, ``"bfloat16"``, ``"float32"`` or ``"fixed8"`` (8 bits, multiples of a power
            of two): other parameters are rounded to it at once, so that the packed network and its file agree bit
            for bit; they keep their own dtype to compute. A tensor whose values do not survive that is left as it
            is, and so are all buffers; None leaves all.
        metadata: plain JSON to keep in the file; ``"network"`` is filled in where
            :mod:`sqs_pyro.networks.registry` has built the network. The result's ``packed_metadata`` can be edited
            until it is saved.

    Raises:
        NetworkError: for names or shapes that are not the network's, an unknown layout or dtype, or a module
            whose weights cannot be packed.
    """
    check_replaceable(net)
    return running_network(net, pack(net, coded, layout=layout, leftover_dtype=leftover_dtype, metadata=metadata))


@lasting_tensors()
def packed_ensemble(
    net: nn.Module,
    draws: Sequence[Mapping[str, CodedTensor]],
    *,
    layout: str = "auto",
    leftover_dtype: str | None = "float16",
    metadata: Mapping[str, Any] | None = None,
) -> PackedEnsemble:
    """Return the average of packed draws of ``net``, in eval mode: codebooks and all other tensors are shared.

    Args:
        net: the network; it stays as it is.
        draws: of each network, the compressed weights by parameter name.
        layout: a layout's name; ``"auto"`` tries ``"conditional"``, too.
        leftover_dtype, metadata: see :func:`packed_network`.

    Raises:
        NetworkError: as :func:`packed_network`; or there is no draw, or draws differ in names or codebooks.
    """
    check_replaceable(net)
    contents = pack_draws(net, draws, layout=layout, leftover_dtype=leftover_dtype, metadata=metadata)
    packed = running_network(net, contents)
    assert isinstance(packed, PackedEnsemble)
    return packed


@lasting_tensors()
def running_network(net: nn.Module, contents: PackedContents) -> nn.Module:
    """Return the network, in eval mode, that runs on what has just been packed of ``net``.

    Its weights know their size and what they are packed to again, without being packed to be counted.

    Raises:
        NetworkError: a module's weights cannot be packed.
    """
    packed = assemble(net, contents)
    # Only here: contents that were read from a file may be of a foreign writer, whose codes are not canonical.
    weights = stored_weights(packed.network if isinstance(packed, StoredEnsemble) else packed)
    # What was loaded is not known to be canonical, so that only what was packed here is remembered.
    for record in contents.records():
        weight = weights[record.name]
        assert isinstance(weight, PackedWeight)
        weight.remember(record, contents.tensors[record.name])
    return _finish(packed)


@enough_resources("Saving a packed file")
@isolated()
def save(packed: nn.Module, path: str | Path) -> None:
    """Write a packed network to a file, which appears complete or not at all.

    Tensors that are not compressed are stored in the smallest floating dtype that holds them exactly.

    Raises:
        NetworkError: if ``packed`` is not a packed network, or its metadata is not plain JSON.
        OutputError: if the file cannot be written.
    """
    write_packed(path, contents_of(packed))


@enough_resources("Loading a packed file")
def load(path: str | Path, net: nn.Module | Callable[[], nn.Module] | None = None) -> nn.Module:
    """Return the packed network of a file, in eval mode; its outputs equal those of the saved one exactly.

    Args:
        path: the file.
        net: the network it belongs to, whatever its weights (also on the ``meta`` device; it stays as it is),
            or what builds it. None: built from the file's metadata through :mod:`sqs_pyro.networks.registry`.

    Raises:
        PackedFileError: if the file is not intact, holds NaN, or was made for another network.
        RecipeError: if the registry does not know the file's network.
        NetworkError: if ``net`` is no network and builds none.
        ResourceError: if there is too little memory.
    """
    # Open until the end: each compressed tensor is read when it is brought to its run-time form.
    with ExitStack() as opened:
        with isolated():
            # Outside of the caller's modes and default device: tensors of a file are CPU tensors that last.
            contents, envelope = opened.enter_context(opened_file(path))
            # Nothing of the file is executed: it names a constructor of the registry, whose size is checked first.
            plain = described_network(contents, envelope.total) if net is None else net
        return _running(path, plain, contents)


def _running(path: str | Path, plain: Any, contents: PackedContents) -> nn.Module:
    """Return the packed network of a file's contents, given a plain one or what builds it."""
    if not isinstance(plain, nn.Module):
        with isolated(sees_dtype=True):  # what the caller builds has the caller's dtype; first weights are drawn
            plain = _built(plain)
    with isolated(plain):
        check_replaceable(plain)
        try:
            packed = assemble(plain, contents)  # compares everything with the network
            check_finite(packed)  # the file's own numbers: a checksum vouches for NaN, too
        except (NetworkError, PackedFileError) as error:
            raise PackedFileError(
                f"Packed file {str(path)!r} cannot be used with this {type(plain).__name__}. {error}"
            ) from None
        return _finish(packed)


@lasting_tensors()
def dense_state(packed: nn.Module) -> dict[str, Tensor]:
    """Return the way back to a plain checkpoint: a state dict for the original network.

    Compressed weights are decoded to float32, shared tensors stand under each of their names.

    Raises:
        NetworkError: an ensemble is given.
    """
    if isinstance(packed, StoredEnsemble):
        raise NetworkError(f"An ensemble of {packed.num_draws} draws is no single checkpoint: give one network.")
    weights = stored_weights(packed, every_name=True)
    inside = {id(buffer) for weight in weights.values() for buffer in weight.buffers()}
    # By every name: a strict load of the original network asks for each.
    state = {
        name: value.detach()
        for name, value in packed.state_dict(keep_vars=True).items()
        if id(value) not in inside
    }
    decoded = {name: weight.coded().dense().to(next(weight.buffers()).device) for name, weight in weights.items()}
    return {**state, **decoded}


def _built(function: Any) -> nn.Module:
    built = function() if callable(function) else function
    if not isinstance(built, nn.Module):
        given = "what load was given made" if callable(function) else "load was given"
        raise NetworkError(
            f"For the network {given} a {type(built).__name__}: give a torch.nn.Module, or a function without "
            "arguments that makes one."
        )
    return built


def after_packing(function: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """Decorator: call ``function`` with every packed network that is made or loaded from now on.

    For other libraries' networks, which may need to know that they are packed (how to save themselves, say).
    """
    _after_packing.append(function)
    return function


# Of the process: integrations register themselves when their library is imported.
_after_packing: list[Callable[[nn.Module], None]] = []


def _finish(packed: nn.Module) -> nn.Module:
    for function in _after_packing:
        function(packed)
    # A packed network is there to be run: its weights are constants.
    return packed.eval()
