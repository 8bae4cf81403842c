"""What a hardened weight *is*: codes, mask and codebook, free of layout, file and device kernels."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sqs_pyro.errors import NetworkError

MAX_COMPONENTS = 256  # codes are uint8
_FEWEST = 128  # steps that the least value of a codebook may be
_CHUNK = 1 << 16  # weights indexed at once: their int64 indices stay in the cache


@dataclass(frozen=True, eq=False)
class CodedTensor:
    """A weight tensor whose every element is exactly zero or one of its group's codebook values, times a scale.

    The tensor is flattened row by row and cut into G equal contiguous groups, ``view(G, n)``, each with one
    row of the codebook: G = 1 for a codebook per layer, ``shape[0]`` per out-channel, ``numel / t`` for
    tiles of t weights.

    Attributes:
        codes: uint8 ``[*shape]``, index into the group's codebook row; 0 where ``mask`` is False.
        mask: bool ``[*shape]``, True where the weight is not zero.
        codebook: float32 ``[G, K]`` with 1 <= K <= 256, all finite.
        scales: float32, positive numbers of float16, that codebook values are multiplied by: ``[shape[0]]``, one
            of each out-channel, or ``[shape[0], B]``, one of each of B >= 2 equal contiguous parts of its weights.
            None is 1 for all. So channels, or groups of their inputs, of different sizes share one codebook and
            one table of frequencies.

    Raises:
        NetworkError: where a shape, a dtype, a code or a codebook value breaks the above.
    """

    codes: Tensor
    mask: Tensor
    codebook: Tensor
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        _check_dtypes(self)
        _check_shapes(self)
        _check_values(self)

    @classmethod
    def unchecked(cls, codes: Tensor, mask: Tensor, codebook: Tensor, scales: Tensor | None) -> "CodedTensor":
        """Return a coded tensor that is right by construction, without reading all of its codes again."""
        coded = object.__new__(cls)
        fields = {"codes": codes, "mask": mask, "codebook": codebook, "scales": scales}
        for name, value in fields.items():
            object.__setattr__(coded, name, value)
        return coded

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight tensor."""
        return tuple(self.codes.shape)

    @property
    def num_groups(self) -> int:
        """G, the number of codebook rows."""
        return self.codebook.shape[0]

    @property
    def num_components(self) -> int:
        """K, the number of values in a codebook row."""
        return self.codebook.shape[1]

    @cached_property
    def nonzeros(self) -> int:
        """Number of weights that are not zero."""
        return int(count_true(self.mask.reshape(1, -1)))  # cached: layouts ask several times

    @property
    def codebook_dtype(self) -> str:
        """``"float16"`` where every codebook value survives the trip through float16, else ``"float32"``."""
        return "float16" if torch.equal(self.codebook.half().float(), self.codebook) else "float32"

    def dense(self) -> Tensor:
        """Return the weights, float32 ``[*shape]``: the reference every packed form must equal exactly."""
        # [G, n] -> [*shape]
        values = look_up(self.codebook, self.codes.reshape(self.num_groups, -1)).view(self.shape)
        values = scaled(values, self.scales)
        # Not times the mask: a negative value times 0 is -0.0, and packed forms are compared bit for bit.
        return torch.where(self.mask, values, values.new_zeros(()))

    def whole_numbers(self) -> tuple[Tensor, Tensor] | None:
        """Return the weights as whole numbers, int8 ``[*shape]``, times scales, float32 ``[N]`` or ``[N, B]``.

        None where a codebook is no whole numbers times one step, or its weights are no whole out-channels.
        """
        channels, groups = self.shape[0], self.num_groups
        found = _steps(self.codebook)
        if found is None or channels % groups:
            return None
        numbers, steps = found
        values = look_up(numbers, self.codes.reshape(groups, -1)).view(self.shape)
        steps = steps.repeat_interleave(channels // groups)  # [G] -> [N]
        scales = steps if self.scales is None else scaled(self.scales, steps)
        return torch.where(self.mask, values, values.new_zeros(())), scales

    def unscaled(self) -> "CodedTensor":
        """Return the same weights without scales: a codebook for each of what had one, ``[N, K]`` or ``[N B, K]``.

        Raises:
            NetworkError: parts with a scale have several codebooks.
        """
        if self.scales is None:
            return self
        count = self.scales.numel()
        if count % self.num_groups:
            raise NetworkError(
                f"{count} scales do not divide {self.num_groups} codebooks: give codebooks of whole parts."
            )
        rows = self.codebook.repeat_interleave(count // self.num_groups, 0)
        return replace(self, codebook=rows * self.scales.view(-1, 1), scales=None)


def _steps(codebook: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return whole numbers, int8 ``[G, K]``, and steps, ``[G]``, whose products are the codebook's values."""
    least = codebook.abs().masked_fill(codebook == 0, torch.inf).amin(1, keepdim=True)
    numbers, steps = torch.zeros_like(codebook), least.isinf().to(codebook)  # 1 of a weight of zeros alone
    # The least value is one step, or a few where those below it are not used.
    for few in range(_FEWEST, 0, -1):
        step = least / few
        places = (codebook / step).round()
        fits = ((places * step == codebook) & (places >= -128) & (places <= 127)).all(1, keepdim=True)
        numbers, steps = torch.where(fits, places, numbers), torch.where(fits, step, steps)
    return (numbers.to(torch.int8), steps[:, 0]) if bool((steps > 0).all()) else None


def stack_draws(draws: Sequence[CodedTensor]) -> CodedTensor:
    """Return draws of one tensor as one tensor ``[*shape, S]``: same groups, same codebook, same scales.

    Raises:
        NetworkError: there is none, or they differ in shape, codebook or scales.
    """
    if not draws:
        raise NetworkError("There is no draw to stack: give at least one.")
    first = draws[0]
    for draw in draws:
        if draw.shape != first.shape or not _same(draw.codebook, first.codebook):
            raise NetworkError(
                "Draws that are stored together must have one shape and one codebook: draw them anew."
            )
        if not _same(draw.scales, first.scales):
            raise NetworkError("Draws that are stored together must have the same scales: draw them anew.")
    # The last dimension: G contiguous groups of n weights become G contiguous groups of n S.
    codes, mask = (torch.stack([getattr(draw, name) for draw in draws], dim=-1) for name in ("codes", "mask"))
    return CodedTensor(codes, mask, first.codebook, first.scales)


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    return first is second or (first is not None and second is not None and torch.equal(first, second))


def scaled(values: Tensor, scales: Tensor | None) -> Tensor:
    """Return values ``[N, ...]`` times ``scales``, if there are any: ``[N]``, or ``[N, B]`` of equal parts."""
    if scales is None:
        return values
    return (values.reshape(*scales.shape, -1) * scales.unsqueeze(-1)).view(values.shape)


def rounded_scales(scales: Tensor) -> Tensor:
    """Return positive scales as a file has them, float16 in float32: none is 0 or infinite, or has lost digits."""
    limits = torch.finfo(torch.float16)
    return scales.clamp(limits.smallest_normal, limits.max).half().float()


def block_scales(scales: Tensor, blocks: int) -> Tensor:
    """Return scales ``[N]`` or ``[N, B]`` as one for each of so many equal blocks, ``[N, blocks]``.

    Args:
        scales: as :attr:`CodedTensor.scales`.
        blocks: a multiple of B.
    """
    each = scales.reshape(len(scales), -1)
    return each.repeat_interleave(blocks // each.shape[1], dim=1)


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """Return ``table[g, codes[g, i]]``.

    Args:
        table: ``[G, S]``, any dtype.
        codes: uint8 ``[G, n]``, each below S.

    Returns:
        Tensor ``[G, n]`` of the table's dtype.
    """
    values = table.new_empty(codes.shape)
    for rows, columns in _chunks(codes):
        # gather wants int64, eight times the codes: a chunk at a time.
        values[rows, columns] = table[rows].gather(1, codes[rows, columns].long())
    return values


def count_codes(codes: Tensor, mask: Tensor, components: int) -> Tensor:
    """Return how many non-zero weights of each group have each code, int64 ``[G, K]``.

    Args:
        codes: uint8 ``[G, n]``, each below K, 0 where the mask is False.
        mask: bool ``[G, n]``.
        components: K.
    """
    counts = torch.zeros(len(codes), components, dtype=torch.long, device=codes.device)  # [G, K]
    for rows, columns in _chunks(codes):
        part = codes[rows, columns]
        # Codes of row r are counted in bins r K .. r K + K - 1, so that one bincount serves all rows of the chunk.
        first = components * torch.arange(len(part), dtype=torch.int32, device=codes.device)[:, None]
        index = (part + first if len(part) > 1 else part).reshape(-1)
        counts[rows] += torch.bincount(index, minlength=len(part) * components).view(-1, components)
    counts[:, 0] -= codes.shape[1] - count_true(mask)  # zeros have code 0 as well
    return counts


def count_true(mask: Tensor) -> Tensor:
    """Return how many elements of each row of a mask ``[G, n]`` are True, int64 ``[G]``."""
    if len(mask) == 1:
        return torch.count_nonzero(mask).view(1)
    if mask.device.type == "cpu":  # NumPy counts ten times faster than torch along a dimension
        return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))
    return torch.count_nonzero(mask, dim=1)


def _chunks(codes: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut ``[G, n]`` into whole rows, or long rows into parts, of at most _CHUNK elements."""
    groups, size = codes.shape
    height = max(1, _CHUNK // size)  # rows of groups that fit; 1 where a row itself is cut
    for top in range(0, groups, height):
        for left in range(0, size, _CHUNK):
            yield slice(top, top + height), slice(left, left + _CHUNK)


def _check_dtypes(coded: CodedTensor) -> None:
    expected = {"codes": torch.uint8, "mask": torch.bool, "codebook": torch.float32}
    if coded.scales is not None:
        expected["scales"] = torch.float32
    for name, dtype in expected.items():
        value = getattr(coded, name)
        if not isinstance(value, Tensor) or value.dtype != dtype:
            given = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise NetworkError(f"CodedTensor.{name} must be a {dtype} tensor, but {given} was given.")


def _check_shapes(coded: CodedTensor) -> None:
    shape, numel = coded.shape, math.prod(coded.codes.shape)
    if coded.mask.shape != coded.codes.shape:
        raise NetworkError(f"Mask of shape {tuple(coded.mask.shape)} does not fit codes of shape {shape}.")
    if coded.codebook.dim() != 2 or not 1 <= coded.codebook.shape[-1] <= MAX_COMPONENTS:
        raise NetworkError(
            f"A codebook must have shape [G, K] with 1 <= K <= {MAX_COMPONENTS}, "
            f"but {list(coded.codebook.shape)} was given."
        )
    groups = coded.num_groups
    if numel == 0 or groups == 0 or numel % groups:
        raise NetworkError(
            f"A weight tensor of shape {shape} has {numel} weights, which {groups} codebooks cannot share "
            "equally: the number of groups must divide a number of weights above zero."
        )
    if coded.scales is not None and not _scales_fit(tuple(coded.scales.shape), shape):
        raise NetworkError(
            f"Scales of shape {list(coded.scales.shape)} do not fit a weight of shape {list(shape)}: give one for "
            "each out-channel, the first dimension, or two or more, of parts of equal size."
        )


def _scales_fit(scales: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    if len(scales) == 1:
        return scales == shape[:1]
    each = math.prod(shape[1:])  # weights of an out-channel
    return len(scales) == 2 and scales[0] == shape[0] and scales[1] >= 2 and each % scales[1] == 0


def check_tables(codebook: Tensor, scales: Tensor | None) -> None:
    """Check that a codebook ``[G, K]`` is finite, and that scales are positive numbers of float16.

    Raises:
        NetworkError: they are not.
    """
    if not torch.isfinite(codebook).all():
        raise NetworkError("A codebook holds NaN or infinite values; check that training has not diverged.")
    if scales is not None:
        # The file has 2 bytes a scale; rounded there, the file would not be the network that was judged.
        halves = scales.half()
        if not (halves.isfinite() & (halves > 0)).all() or not torch.equal(halves.float(), scales):
            raise NetworkError("Scales must be positive, finite numbers of float16: round them to float16 first.")


def check_codes(codes: Tensor, components: int) -> None:
    """Check that codes, uint8 and at least one, are below K.

    Raises:
        NetworkError: one is not.
    """
    highest = int(codes.max())
    if highest >= components:
        raise NetworkError(
            f"Code {highest} is outside of the codebook: with K = {components} components codes go "
            f"from 0 to {components - 1}."
        )


def _check_values(coded: CodedTensor) -> None:
    check_tables(coded.codebook, coded.scales)
    check_codes(coded.codes, coded.num_components)
    # Codes of zeros have one spelling, 0: equal networks must have equal files, and `count_codes` relies on it.
    codes, mask = (value.reshape(-1).split(_CHUNK) for value in (coded.codes, coded.mask))
    if any(bool((some.bool() > kept).any()) for some, kept in zip(codes, mask, strict=True)):
        raise NetworkError("Codes must be 0 where the mask is False (a zero weight has no codebook value).")
