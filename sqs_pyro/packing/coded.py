"""What a hardened weight *is*: codes, mask and codebook, free of layout, file and device kernels."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sqs_pyro.errors import NetworkError

MAX_COMPONENTS = 256
_LOOKUP_CHUNK = 1 << 22  # weights looked up at once: int64 indices of a whole LLM layer would not fit


@dataclass(frozen=True, eq=False)
class CodedTensor:
    """A weight tensor whose every element is exactly zero or one of its group's codebook values.

    The tensor is flattened row by row and cut into G equal contiguous groups, ``view(G, n)``, each with one
    row of the codebook: G = 1 for a codebook per layer, ``shape[0]`` per out-channel, ``numel / t`` for
    tiles of t weights.

    Attributes:
        codes: uint8 ``[*shape]``, index into the group's codebook row; 0 where ``mask`` is False.
        mask: bool ``[*shape]``, True where the weight is not zero.
        codebook: float32 ``[G, K]`` with 1 <= K <= 256, all finite.

    Raises:
        NetworkError: where a shape, a dtype, a code or a codebook value breaks the above.
    """

    codes: Tensor
    mask: Tensor
    codebook: Tensor

    def __post_init__(self) -> None:
        _check_dtypes(self)
        _check_shapes(self)
        _check_values(self)

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

    @property
    def nonzeros(self) -> int:
        """Number of weights that are not zero."""
        return int(self.mask.sum())

    @property
    def codebook_dtype(self) -> str:
        """``"float16"`` where every codebook value survives the trip through float16, else ``"float32"``."""
        return "float16" if torch.equal(self.codebook.half().float(), self.codebook) else "float32"

    def dense(self) -> Tensor:
        """Return the weights, float32 ``[*shape]``: the reference every packed form must equal exactly."""
        values = look_up(self.codebook, self.codes.reshape(self.num_groups, -1)).view(self.shape)
        return torch.where(self.mask, values, values.new_zeros(()))


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """Return ``table[g, codes[g, i]]``.

    Args:
        table: ``[G, S]``, any dtype.
        codes: uint8 ``[G, n]``, each below S.

    Returns:
        Tensor ``[G, n]`` of the table's dtype.
    """
    groups, size = codes.shape
    values = table.new_empty((groups, size))
    rows = max(1, _LOOKUP_CHUNK // max(size, 1))
    for start in range(0, groups, rows):
        part = slice(start, start + rows)
        for left in range(0, size, _LOOKUP_CHUNK):
            columns = slice(left, left + _LOOKUP_CHUNK)
            values[part, columns] = table[part].gather(1, codes[part, columns].long())
    return values


def _check_dtypes(coded: CodedTensor) -> None:
    expected = {"codes": torch.uint8, "mask": torch.bool, "codebook": torch.float32}
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


def _check_values(coded: CodedTensor) -> None:
    if not torch.isfinite(coded.codebook).all():
        raise NetworkError("A codebook holds NaN or infinite values; check that training has not diverged.")
    highest = int(coded.codes.max())
    if highest >= coded.num_components:
        raise NetworkError(
            f"Code {highest} is outside of the codebook: with K = {coded.num_components} components codes go "
            f"from 0 to {coded.num_components - 1}."
        )
    if coded.codes.masked_select(~coded.mask).any():
        raise NetworkError("Codes must be 0 where the mask is False (a zero weight has no codebook value).")
