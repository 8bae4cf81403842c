"""A compressed weight in a graph of ONNX: codes, and the nodes that read them for each of the weight's users."""

import importlib
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sqs_pyro.packing.bits import pack_bits
from sqs_pyro.packing.coded import CodedTensor, block_scales

_BITS = {"UINT2": 2, "UINT4": 4, "INT4": 4, "UINT8": 8}
_CONTRIB = "com.microsoft"  # operators of ONNX Runtime
_LINEAR = {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}  # of a Gemm that is x Wᵀ + b
_BLOCKS = (256, 128, 64, 32, 16)  # inputs that share a scale, as it has kernels for them


class WrittenWeight:
    """One compressed weight in a graph.

    * A product ``x Wᵀ`` with whole numbers times scales, of outputs or of parts of a multiple of 16 inputs, is
      ONNX Runtime's ``MatMulNBits``, which multiplies with the codes.
    * A look-up of rows, as of an embedding, looks up codes, and decodes what it has found.
    * For all else the weight is ``Gather(codebook, codes)``, which runtimes compute when they load; or, where that
      is asked for, whole numbers are ``DequantizeLinear`` of int4 or int8, which they keep.

    Scales of parts multiply ``[N, B, m]``, a part in each row: only codes take bytes for each weight.

    Args:
        graph: of onnx_ir.
        name: of the parameter.
        holes: values that stand for the weight; no inputs of the graph any more.
        coded: the weight.
        kept: whether whole numbers that no product takes are kept as quantized weights.
        two_bits: whether there may be UINT2.
    """

    def __init__(
        self, graph: Any, name: str, holes: Sequence[Any], coded: CodedTensor, kept: bool, two_bits: bool
    ) -> None:
        self.ir, self.graph, self.holes, self.hole = importlib.import_module("onnx_ir"), graph, holes, holes[0]
        self.name, self.coded, self.kept, self.least = name, coded, kept, "UINT2" if two_bits else "UINT4"
        self.count, self.first = 0, graph[0]  # what is there already comes after the weight
        self.ways: list[str] = []

    @property
    def form(self) -> str:
        """What the weight has become, in a few words."""
        return " and ".join(dict.fromkeys(self.ways))

    def fill(self) -> None:
        """Give each user of a hole what it needs of the weight."""
        users = [user for hole in self.holes for user in hole.uses()]
        shown = any(value in self.holes for value in self.graph.outputs)
        if shown or not all(self._is_look_up(*user) or self._is_product(*user) for user in users):
            for hole in self.holes:  # what one user decodes is there for all
                hole.replace_all_uses_with(self.decoded, replace_graph_outputs=True)
            return
        for node, _ in users:
            if node.op_type == "Gather":
                self._look_up(node)
            elif node.op_type == "Gemm":
                self._multiply(node, node.inputs[2] if len(node.inputs) > 2 else None)
            else:
                for user, _ in tuple(node.outputs[0].uses()):
                    self._multiply(user, None)
                self.graph.remove(node, safe=True)

    # -- all of it

    @cached_property
    def decoded(self) -> Any:
        """The value of the whole weight, made in front of the graph."""
        whole = self._whole if self.kept else None
        value = self._looked_up() if whole is None else self._dequantized(*whole)
        if self.hole.dtype != self.ir.DataType.FLOAT:
            value = self._op(self.first, "Cast", value, to=self.hole.dtype)
        # It takes over the hole's name: the graph's users find it under the parameter's.
        value.name, value.shape, value.dtype = self.name, self.hole.shape, self.hole.dtype
        return value

    def _dequantized(self, numbers: Tensor, scales: Tensor) -> Any:
        bits = max(self.whole_bits, 4)
        self.ways.append(f"DequantizeLinear of int{bits}")
        of_parts = scales.dim() == 2
        if of_parts:  # blocks are of a matrix's rows: of a convolution's weights of an output
            numbers = numbers.view(len(numbers), -1)
        low = (numbers & 15).to(torch.uint8)  # the bits of a number of 4
        codes = self._codes(low, "INT4") if bits == 4 else self._constant("codes", numbers)
        operands = codes, self._floats("scales", scales)
        if not of_parts:
            return self._op(self.first, "DequantizeLinear", *operands, axis=0)
        block = numbers.shape[1] // scales.shape[1]
        value = self._op(self.first, "DequantizeLinear", *operands, axis=1, block_size=block)
        return self._shaped(value) if len(self.coded.shape) > 2 else value

    def _looked_up(self) -> Any:
        coded, at = self.coded, self.first
        dtype = max(dtype_of(coded), self.least, key=_BITS.__getitem__)
        self.ways.append(f"Gather of {dtype} codes")
        symbols, table = _symbols(coded)
        shape = scaled = list(coded.shape)
        if coded.scales is not None and coded.scales.dim() == 2:
            scaled = [*coded.scales.shape, math.prod(shape[1:]) // coded.scales.shape[1]]  # [N, B, m]
        int32 = self.ir.DataType.INT32
        if coded.num_groups == 1:
            # Gather takes int32 indices, not UINT2 or UINT4; runtimes fold the cast when they load.
            indices = self._op(at, "Cast", self._codes(symbols.view(scaled), dtype), to=int32)
            value = self._op(at, "Gather", self._floats("codebook", table.view(-1)), indices)
        else:
            rows = symbols.view(coded.num_groups, -1)  # [G, n]: a row of the table each
            indices = self._op(at, "Cast", self._codes(rows, dtype), to=int32)
            found = self._op(at, "GatherElements", self._floats("codebook", table), indices, axis=1)
            value = self._op(at, "Reshape", found, self._constant("scaled", torch.tensor(scaled)))
        if coded.scales is not None:
            scales = coded.scales.view(*coded.scales.shape, *[1] * (len(scaled) - coded.scales.dim()))
            value = self._op(at, "Mul", value, self._floats("scales", scales))
        if scaled != shape:
            value = self._shaped(value)
        if has_mask(coded):
            kept = self._op(at, "Cast", self._codes(coded.mask.to(torch.uint8), self.least, "mask"), to=int32)
            kept = self._op(at, "Cast", kept, to=self.ir.DataType.BOOL)
            value = self._op(at, "Where", kept, value, self._constant("zero", torch.tensor(0.0)))
        return value

    def _shaped(self, value: Any) -> Any:
        """Return numbers in the weight's own shape."""
        return self._op(self.first, "Reshape", value, self._constant("shape", torch.tensor(self.coded.shape)))

    # -- rows of it

    def _is_look_up(self, node: Any, place: int) -> bool:
        """Return whether a node looks up rows of whole bytes."""
        axis = node.attributes.get("axis")
        if node.op_type != "Gather" or place != 0 or (axis is not None and axis.as_int() != 0):
            return False
        coded = self.coded
        if len(coded.shape) != 2 or coded.num_groups > 1 or has_mask(coded) or node.inputs[1].shape is None:
            return False
        # Blocks that are filled up have longer rows.
        return self.block is not None if self.whole_bits else coded.shape[1] * _BITS[dtype_of(coded)] % 8 == 0

    def _look_up(self, node: Any) -> None:
        """Let a look-up of rows look up codes, and decode what it has found."""
        coded = self.coded
        bits, ids = self.whole_bits or _BITS[dtype_of(coded)], node.inputs[1]
        each = 8 // bits
        found = self._op(node, "Gather", self._row_codes, ids, axis=0)  # [..., bytes], or [..., blocks, bytes]
        codes = self._op(node, "Cast", found, to=self.ir.DataType.INT32)
        if each > 1:  # bytes of several codes, of which the first is in the lowest bits
            # Divided and not shifted: runtimes disagree about shifts of bytes.
            places = self._constant("places", 2 ** (bits * torch.arange(each, dtype=torch.int32)))
            codes = self._op(node, "Unsqueeze", codes, self._constant("last", torch.tensor([-1])))
            codes = self._op(node, "Div", codes, places)
            codes = self._op(node, "Mod", codes, self._constant("size", torch.tensor(2**bits, dtype=torch.int32)))
        value = self._scaled_rows(node, self._values(node, codes), ids)
        if self.hole.dtype != self.ir.DataType.FLOAT:
            value = self._op(node, "Cast", value, to=self.hole.dtype)
        self.ways.append(f"rows of {bits}-bit codes")
        self._replace(node, value)

    def _values(self, node: Any, codes: Any) -> Any:
        """Return the values of codes, int32, without scales."""
        if self.whole_bits:
            numbers = self._op(node, "Cast", codes, to=self.ir.DataType.FLOAT)
            middle = self._constant("middle", torch.tensor(float(2 ** (self.whole_bits - 1))))
            return self._op(node, "Sub", numbers, middle)
        return self._op(node, "Gather", self._floats("codebook", _symbols(self.coded)[1].view(-1)), codes)

    def _scaled_rows(self, node: Any, values: Any, ids: Any) -> Any:
        """Return the values of rows' codes as ``[..., M]``, times the rows' scales."""
        rows, scales = [0] * len(ids.shape), self._scales
        row = self._constant("row", torch.tensor([*rows, self.coded.shape[1]]))
        if scales is None:
            return self._op(node, "Reshape", values, row)
        of_blocks = self.whole_bits and self._parts > 1  # the product's own where there is one
        held = self._block_scales if of_blocks else self._floats("scales", scales.view(-1, self._parts))
        shape = torch.tensor([*rows, self._num_blocks if of_blocks else self._parts, -1])  # [..., B, m]
        values = self._op(node, "Reshape", values, self._constant("parts", shape))
        own = self._op(node, "Gather", held, ids, axis=0)
        own = self._op(node, "Unsqueeze", own, self._constant("last", torch.tensor([-1])))  # [..., B, 1]
        return self._op(node, "Reshape", self._op(node, "Mul", values, own), row)

    @cached_property
    def _row_codes(self) -> Any:
        """The initializer whose rows are looked up, uint8: the product's own where there is one."""
        if self.whole_bits:
            return self._blocks
        symbols, _ = _symbols(self.coded)
        packed = pack_bits(symbols.reshape(-1), _BITS[dtype_of(self.coded)])
        return self._constant("codes", packed.view(len(self.coded.codes), -1))

    # -- products with it

    def _is_product(self, node: Any, place: int) -> bool:
        """Return whether a node, or all of its users, are products with whole numbers."""
        if not self.whole_bits or self.hole.dtype != self.ir.DataType.FLOAT or len(self.coded.shape) != 2:
            return False
        if self.block is None and self._parts > 1:
            return False  # a block would have several scales
        if node.op_type == "Gemm" and place == 1:
            options = {name: value.value for name, value in node.attributes.items()}
            return {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0} | options == _LINEAR
        if node.op_type != "Transpose" or list(node.attributes["perm"].as_ints()) != [1, 0]:
            return False
        users = tuple(node.outputs[0].uses())
        return bool(users) and all(user.op_type == "MatMul" and at == 1 for user, at in users)

    def _multiply(self, node: Any, bias: Any) -> None:
        outputs, inputs = self.coded.shape
        bits, block = self.whole_bits, self.block or _BLOCKS[-1]
        sizes = {"N": outputs, "K": inputs, "bits": bits, "block_size": block}
        operands = (node.inputs[0], self._blocks, self._block_scales)
        value = self._op(node, "MatMulNBits", *operands, domain=_CONTRIB, **sizes)
        self.graph.opset_imports[_CONTRIB] = 1
        if bias is not None:
            value = self._op(node, "Add", value, bias)
        self.ways.append(f"MatMulNBits of {bits} bits")
        self._replace(node, value)

    @cached_property
    def whole_bits(self) -> int:
        """Bits of the weight's whole numbers, as ``MatMulNBits`` takes them; 0 if it has none."""
        if self._whole is None:
            return 0
        numbers = self._whole[0]
        low, high = int(numbers.min()), int(numbers.max())
        return next(bits for bits in (2, 4, 8) if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1))

    @cached_property
    def _whole(self) -> tuple[Tensor, Tensor] | None:
        return self.coded.whole_numbers()

    @property
    def _scales(self) -> Tensor | None:
        """Of the whole numbers where there are some, else of the codebook's values."""
        return self.coded.scales if self._whole is None else self._whole[1]

    @property
    def _parts(self) -> int:
        """B, parts of an output that have scales of their own."""
        return 1 if self._scales is None or self._scales.dim() == 1 else self._scales.shape[1]

    @property
    def block(self) -> int | None:
        """Inputs of a block, as many as divide a part; None where none does."""
        part = self.coded.shape[1] // self._parts
        return next((size for size in _BLOCKS if part % size == 0), None)

    @property
    def _num_blocks(self) -> int:
        """Of an output, the last filled up."""
        return -(-self.coded.shape[1] // (self.block or _BLOCKS[-1]))

    @cached_property
    def _blocks(self) -> Any:
        """Whole numbers from 0, ``[N, blocks, bytes]``, filled up with zeros' numbers."""
        assert self._whole is not None
        bits, size = self.whole_bits, self.block or _BLOCKS[-1]
        numbers = (self._whole[0].int() + 2 ** (bits - 1)).to(torch.uint8)
        missing = -numbers.shape[1] % size
        numbers = torch.nn.functional.pad(numbers, (0, missing), value=2 ** (bits - 1))
        packed = pack_bits(numbers.reshape(-1), bits)
        return self._constant("blocks", packed.view(len(numbers), numbers.shape[1] // size, -1))

    @cached_property
    def _block_scales(self) -> Any:
        """A scale for each block, float32 ``[N, blocks]``."""
        assert self._whole is not None
        made = self._floats if self._parts > 1 else self._constant  # those of outputs are little of a file
        return made("block_scales", block_scales(self._whole[1], self._num_blocks))

    # -- writing

    def _replace(self, node: Any, value: Any) -> None:
        """Let a value stand for what a node gave."""
        (old,) = node.outputs
        value.name, value.shape, value.dtype = old.name, old.shape, old.dtype
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def _codes(self, symbols: Tensor, dtype: str, part: str = "codes") -> Any:
        """Return an initializer of small integers, given by their bits."""
        bits, name = _BITS[dtype], f"{self.name}.{part}"
        if bits == 8:
            return self._constant(part, symbols)
        packed = pack_bits(symbols.reshape(-1), bits).numpy()
        shape = self.ir.Shape(symbols.shape)
        return self._initializer(self.ir.PackedTensor(packed, self.ir.DataType[dtype], shape=shape, name=name))

    def _floats(self, part: str, values: Tensor) -> Any:
        """Return float32 numbers, from float16 where that holds them and is smaller, node included."""
        # A node and its names take some hundred bytes, as many as a short codebook would save.
        if values.numel() > 64 and torch.equal(values.half().float(), values):
            constant = self._constant(part, values.half())
            return self._op(self.first, "Cast", constant, to=self.ir.DataType.FLOAT)
        return self._constant(part, values)

    def _constant(self, part: str, values: Tensor) -> Any:
        """Return an initializer, the same one for the same part."""
        name = f"{self.name}.{part}"
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        return self._initializer(self.ir.Tensor(values.contiguous().numpy(), name=name))

    def _initializer(self, tensor: Any) -> Any:
        """Register a tensor."""
        value = self.ir.Value(
            name=tensor.name, shape=tensor.shape, type=self.ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def _op(self, before: Any, kind: str, *operands: Any, domain: str = "", **attributes: Any) -> Any:
        """Write a node in front of another, for a graph is in the order of computation; return its value."""
        node = self.ir.node(kind, list(operands), attributes, domain=domain)
        self.graph.insert_before(before, node)
        self.count += 1
        node.outputs[0].name = f"{self.name}.{self.count}"
        return node.outputs[0]


def has_mask(coded: CodedTensor) -> bool:
    """Return whether zero finds no place among the codes, because they are 256 already."""
    return coded.num_components == 256 and coded.nonzeros < coded.codes.numel()


def dtype_of(coded: CodedTensor) -> str:
    """Return the smallest integers of ONNX that hold all codes."""
    size = coded.num_components + (coded.nonzeros < coded.codes.numel() and not has_mask(coded))
    return "UINT2" if size <= 4 else "UINT4" if size <= 16 else "UINT8"


def _symbols(coded: CodedTensor) -> tuple[Tensor, Tensor]:
    """Return uint8 ``[*shape]`` and the table ``[G, S]`` that they look up; zero is its first entry, if one is."""
    if coded.nonzeros == coded.codes.numel() or has_mask(coded):
        return coded.codes, coded.codebook
    table = torch.cat([coded.codebook.new_zeros(coded.num_groups, 1), coded.codebook], dim=1)
    return (coded.codes + 1) * coded.mask, table
