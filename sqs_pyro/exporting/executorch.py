"""Programs of ExecuTorch, ``.pte``, in which XNNPACK multiplies with 4 or 8 bits a weight."""

import copy
import importlib
import itertools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import free_symbols

from sqs_pyro.atomic import write_bytes
from sqs_pyro.errors import NetworkError
from sqs_pyro.exporting.exported import Exported, check_one_network
from sqs_pyro.exporting.installed import check_installed
from sqs_pyro.exporting.linear_layers import is_plain_linear
from sqs_pyro.exporting.suffixes import check_suffix
from sqs_pyro.exporting.trace import input_tensors, one_sentence, trace
from sqs_pyro.kernels.modules import PackedEmbedding, PackedLinear
from sqs_pyro.kernels.placing import swap_modules, unpack_weights
from sqs_pyro.packing.stored import stored_weights

_WRITTEN_BY = "written_by_sqs_pyro"  # a method beside `forward`, which a program has by its name


def export_executorch(packed: nn.Module, inputs: Any, path: str | Path) -> Exported:
    """Write a program of ExecuTorch that runs on CPUs by XNNPACK, for batches of at most the example's size.

    Linear layers of whole numbers keep them, as int4 or int8, and XNNPACK multiplies them with inputs in float32;
    where parts of the inputs have scales of their own, it is a product for each part. Embeddings of whole numbers
    look up rows of codes. All else is float32.

    Args:
        packed: a packed network on the CPU.
        inputs: an example of a minibatch, two rows or more, as large as any that the program will be given: its
            memory is planned before it runs.
        path: the file, ``.pte``.

    Raises:
        NetworkError: an ensemble, or a network that cannot be traced or lowered.
        MissingPackageError: executorch is not installed.
        OutputError: the path has another format's suffix, or the file cannot be written.
    """
    check_suffix(path, "executorch", directory=False)
    check_one_network(packed)
    _imported("executorch.exir.passes._quant_patterns_and_replacements")  # the operators of kept layers
    net = copy.deepcopy(packed)
    kept = _kept_layers(net)
    exported = _exported(net, kept)
    program = trace(unpack_weights(swap_modules(net, kept)), inputs, up_to_example=True)
    with one_sentence("lowered to ExecuTorch"):
        _slice(program.graph_module)
        dynamic = _dynamic_sizes(program)  # lowering fixes sizes of what it is given, too
        lowered = _lowered(program)
        content = lowered.to_executorch().buffer
    if _dynamic_sizes(lowered.exported_program()) != dynamic:  # it would end the process that gives it another
        raise NetworkError(
            "Lowering to ExecuTorch fixes a size of the network's inputs, by an operator that must know it: take "
            "another format."
        )
    write_bytes(path, [content])
    return exported


def is_executorch_export(path: Path) -> bool:
    """Return whether a file was written by :func:`export_executorch`; nothing in it is executed."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        # A flatbuffer's identifier behind four bytes, then a header: name, its own bytes, those of the program.
        head = file.read(24)
        program = file.read(int.from_bytes(head[16:24], "little")) if head[4:12] == b"ET12eh00" else b""
    return _WRITTEN_BY.encode() in program


def run_executorch(path: str | Path, inputs: Any) -> tuple[Tensor, ...]:
    """Run a program on this CPU.

    Args:
        path: of the program.
        inputs: a minibatch of at most the size that it was exported with; its tensors have the same order.

    Returns:
        The network's outputs.

    Raises:
        MissingPackageError: executorch is not installed.
    """
    _imported("executorch.kernels.quantized")  # what looks up rows of codes
    runtime = _imported("executorch.runtime").Runtime.get()
    method = runtime.load_program(path).load_method("forward")
    # Copies: outputs are the program's own memory.
    return tuple(value.clone() for value in method.execute([*map(Tensor.contiguous, input_tensors(inputs))]))


def _imported(name: str) -> Any:
    """Return a module of executorch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        check_installed("executorch", name)
    return importlib.import_module(name)


# -- layers in operators that ExecuTorch knows


class _Numbers(nn.Module):
    """A matrix of whole numbers ``[N, m]`` times scales ``[N]``."""

    numbers: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, numbers: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.least = _least(numbers)
        self.register_buffer("numbers", numbers.contiguous())
        self.register_buffer("scales", scales.contiguous())
        self.register_buffer("zeros", torch.zeros(len(numbers), dtype=torch.int64))

    def forward(self) -> Tensor:
        operands = self.numbers, self.scales, self.zeros
        limits = self.least, -self.least - 1
        value: Tensor = torch.ops.quantized_decomposed.dequantize_per_channel(*operands, 0, *limits, torch.int8)
        return value


class _Linear(nn.Module):
    """``x Wᵀ + bias`` of whole numbers; where there are scales of parts, a sum of a product for each part."""

    def __init__(self, replaced: PackedLinear, numbers: Tensor, scales: Tensor) -> None:
        super().__init__()
        scales = scales.view(len(numbers), -1)
        parts = numbers.chunk(scales.shape[1], 1)
        self.parts = nn.ModuleList(_Numbers(*part) for part in zip(parts, scales.T, strict=True))
        self.register_parameter("bias", replaced._parameters["bias"])
        self.form = " and ".join(sorted({_said(part) for part in parts}))

    @property
    def weight(self) -> Tensor:
        """``[N, M]``, for code that asks a layer for it."""
        return torch.cat([part() for part in self.parts], 1)

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.chunk(len(self.parts), -1) if len(self.parts) > 1 else (x,)
        products = [F.linear(each, part()) for each, part in zip(inputs, self.parts, strict=True)]
        value = sum(products[1:], products[0])
        # Not a part of the product, where ExecuTorch would expect inputs of whole numbers.
        bias = self._parameters["bias"]
        return value if bias is None else value + bias


class _Embedding(nn.Module):
    """Rows of whole numbers ``[N, M]`` times scales ``[N]`` or ``[N, B]``."""

    codes: Tensor
    scales: Tensor

    def __init__(self, replaced: PackedEmbedding, numbers: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.least, self.form = _least(numbers), f"rows of {_said(numbers)}"
        if self.least == -8:  # from 0, two in a byte, the first in the higher bits
            unsigned = (numbers + 8).to(torch.uint8)
            numbers = unsigned[:, ::2] * 16 + unsigned[:, 1::2]
        self.register_buffer("codes", numbers)
        self.register_buffer("scales", scales)

    def forward(self, indices: Tensor) -> Tensor:
        operators = torch.ops.quantized_decomposed
        look_up = operators.embedding_4bit if self.least == -8 else operators.embedding_byte
        limits = self.least, -self.least - 1
        rows: Tensor = look_up.dtype(self.codes, self.scales, None, *limits, indices, dtype=torch.float32)
        return rows


def _least(numbers: Tensor) -> int:
    """Return the least number of as many bits, 4 or 8, as hold all; rows of 4 bits are of whole bytes."""
    fits = int(numbers.min()) >= -8 and int(numbers.max()) <= 7 and numbers.shape[1] % 2 == 0
    return -8 if fits else -128


def _said(numbers: Tensor) -> str:
    return "int4" if _least(numbers) == -8 else "int8"


def _kept_layers(net: nn.Module) -> dict[int, _Linear | _Embedding]:
    """Return what replaces layers of whole numbers, by ``id``."""
    kept: dict[int, _Linear | _Embedding] = {}
    for module in net.modules():
        if isinstance(module, PackedEmbedding) or (isinstance(module, PackedLinear) and is_plain_linear(module)):
            whole = module.packed_weight.coded().whole_numbers()
            if whole is not None and module.packed_weight.like.dtype == torch.float32:
                kind = _Embedding if isinstance(module, PackedEmbedding) else _Linear
                kept[id(module)] = kind(module, *whole)  # type: ignore[arg-type]  # of its own kind
    return kept


def _exported(net: nn.Module, kept: Mapping[int, Any]) -> Exported:
    """Return what becomes of each compressed parameter, given the layers that keep theirs."""
    ways: dict[nn.Module, list[str]] = {}
    for module in net.modules():
        for child in module.children():
            ways.setdefault(child, []).append(kept[id(module)].form if id(module) in kept else "float32")
    exported = Exported()
    for name, weight in stored_weights(net).items():
        if set(ways[weight]) == {"float32"}:
            exported.decoded[name] = "no linear layer or embedding of whole numbers, in float32"
        else:
            exported.packed[name] = " and ".join(dict.fromkeys(ways[weight]))
    return exported


# -- lowering


def _slice(module: GraphModule) -> None:
    """Put slices in the place of ``chunk`` and ``split``, where lowering fixes sizes; XNNPACK has them, too."""
    aten, graph = torch.ops.aten, module.graph
    parting = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default}
    for node in [node for node in graph.nodes if node.target in parting]:
        whole, dim = node.args[0], node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        ends = [0, *itertools.accumulate(part.shape[dim] for part in node.meta["val"])]
        if all(isinstance(end, int) for end in ends):
            for user in list(node.users):  # each takes a part
                i = user.args[1]
                with graph.inserting_before(user):
                    part = graph.call_function(aten.slice.Tensor, (whole, dim, ends[i], ends[i + 1]))
                part.meta["val"] = user.meta["val"]
                user.replace_all_uses_with(part)
                graph.erase_node(user)
            graph.erase_node(node)
    module.recompile()


def _lowered(program: ExportedProgram) -> Any:
    """Return a graph that calls XNNPACK."""
    partitioner = _imported("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    chosen = partitioner.XnnpackPartitioner(configs=_configs())
    lower = _imported("executorch.exir").to_edge_transform_and_lower
    return lower(program, partitioner=[chosen], constant_methods={_WRITTEN_BY: 1})


def _dynamic_sizes(program: ExportedProgram) -> list[list[bool]]:
    """Return of each size of each input whether a program takes others than the example's."""
    inputs = set(program.graph_signature.user_inputs)
    shapes = [node.meta["val"].shape for node in program.graph.nodes if node.name in inputs]
    return [[bool(free_symbols(size)) for size in shape] for shape in shapes]


def _configs() -> list[type]:
    """Return what XNNPACK is given: as ever, and products of inputs in float32 with whole numbers.

    Its kernels (``f32_qc4w``, ``f32_qc8w``) are there, but ExecuTorch gives it whole numbers only where inputs are
    rounded to 8 bits, too.
    """
    partition = _imported("executorch.backends.xnnpack.partition.config")
    gemm = _imported("executorch.backends.xnnpack.partition.config.gemm_configs")
    precisions = gemm.ConfigPrecisionType

    class WholeLinear(gemm.LinearConfig):  # type: ignore[name-defined]  # a class of an optional package
        def _detect_precision(self, node: Any) -> Any:
            return precisions.FP32

        def _get_weight_deps(self, node: Any, program: Any, precision: Any) -> Any:
            is_whole = gemm.is_dequant(gemm.get_input_node(node, self.weight_idx))
            return super()._get_weight_deps(node, program, precisions.STATIC_QUANT if is_whole else precision)

    configs = partition.ALL_PARTITIONER_CONFIGS
    return [WholeLinear if config is gemm.LinearConfig else config for config in configs]
