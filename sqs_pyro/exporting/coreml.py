"""Packages of Core ML: weights as look-ups of codes, places of non-zeros, and whole numbers times scales."""

import copy
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._decomp import get_decompositions

from sqs_pyro.atomic import appearing
from sqs_pyro.errors import NetworkError
from sqs_pyro.exporting.exported import Exported, check_one_network
from sqs_pyro.exporting.installed import check_installed
from sqs_pyro.exporting.suffixes import check_suffix
from sqs_pyro.exporting.trace import NETWORK, one_sentence, trace
from sqs_pyro.kernels.placing import unpack_weights
from sqs_pyro.packing.coded import CodedTensor
from sqs_pyro.packing.stored import stored_weights

_MAKER, _SUFFIX = "sqs-pyro", ".mlpackage"
_BITS = (1, 2, 3, 4, 6, 8)  # of indices, as Core ML has them
_FUSING = ("batchnorm", "scale", "conv_bias", "elementwise")  # passes that would make other weights of ours


def export_coreml(packed: nn.Module, inputs: Any, directory: str | Path) -> Exported:
    """Write a package of Core ML (iOS 18, macOS 15) in float32, whose compressed weights are made from codes.

    * Whole numbers times scales: ``constexpr_blockwise_shift_scale`` of int4 or int8.
    * A codebook of the layer, or of each output: ``constexpr_lut_to_dense``, or, where many weights are zero and
      that is smaller, ``constexpr_lut_to_sparse`` and ``constexpr_sparse_to_dense``; scales behind it.

    Scales are those of outputs, or of equal parts of the inputs of each.

    Core ML runs on Apple's systems alone. Here each weight is evaluated by coremltools and compared with the
    packed one, number by number. One that the translator has changed is decoded, and so are codebooks of tiles and
    scales of parts that are no whole inputs.

    Args:
        packed: a packed network on the CPU.
        inputs: an example of a minibatch, two rows or more.
        directory: of the package, ``.mlpackage``.

    Raises:
        NetworkError: an ensemble, or a network that cannot be traced or translated.
        MissingPackageError: coremltools is not installed.
        OutputError: its name has another suffix, or it cannot be written.
    """
    check_suffix(directory, "coreml", directory=False)
    check_one_network(packed)
    with _quiet():
        check_installed("coreml", "coremltools")
        program = trace(unpack_weights(copy.deepcopy(packed)), inputs)
        with one_sentence("translated to Core ML"):
            model, exported = _translated(program, packed)
        model.user_defined_metadata["made by"] = _MAKER
        with appearing(directory) as made:
            package = made.with_suffix(_SUFFIX)
            model.save(str(package))
            for beside in package.glob("*debug*"):  # of the translator itself
                beside.unlink()
            if package != made:
                package.rename(made)
    return exported


def is_coreml_export(path: Path) -> bool:
    """Return whether a package was written by :func:`export_coreml`; its maker stands in the model."""
    model = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    return model.is_file() and _MAKER.encode() in model.read_bytes()


def _translated(program: Any, packed: nn.Module) -> tuple[Any, Exported]:
    tools: Any = importlib.import_module("coremltools")
    target = {"minimum_deployment_target": tools.target.iOS18, "compute_precision": tools.precision.FLOAT32}
    passes = tools.PassPipeline.DEFAULT
    passes.remove_passes([name for name in passes.passes if any(word in name for word in _FUSING)])
    known = _in_known_operators(program)
    made = tools.convert(known, convert_to="milinternal", pass_pipeline=passes, **target)
    exported = _coded_weights(made.functions["main"], packed)
    kept = {"pass_pipeline": tools.PassPipeline.EMPTY, "skip_model_load": True}
    return tools.convert(made, convert_to="mlprogram", **kept, **target), exported


def _in_known_operators(program: Any) -> Any:
    """Write operators that the translator does not know by others; masks of attention have them."""
    aten = torch.ops.aten
    logical = {aten.__and__.Tensor: aten.logical_and.default, aten.__or__.Tensor: aten.logical_or.default}
    program = program.run_decompositions(get_decompositions([aten.new_ones]))
    for node in program.graph.nodes:
        if node.target in logical and node.meta["val"].dtype is torch.bool:
            node.target = logical[node.target]
    program.graph_module.recompile()
    return program


def _coded_weights(function: Any, packed: nn.Module) -> Exported:
    """Put codes in the place of constants that are compressed weights; return what became of each."""
    weights = stored_weights(packed, every_name=True).items()
    by_constant = {f"p_{NETWORK}_{name.replace('.', '_')}": weight for name, weight in weights}
    first = {weight: name for name, weight in reversed(stored_weights(packed).items())}
    exported = Exported(decoded=dict.fromkeys(stored_weights(packed), "the translator has changed it"))
    for constant in list(function.operations):
        if constant.op_type != "const" or constant.name not in by_constant:
            continue
        weight = by_constant[constant.name]
        name = first[weight]
        coded = weight.coded()
        value = constant.outputs[0].val
        if not np.array_equal(value, coded.dense().numpy()):
            continue  # another tensor by now
        with function, _scopes_of(constant):
            made, kind = _Constant(constant).of(coded)
        if made is None:
            exported.decoded[name] = kind
            continue
        if not np.array_equal(made.op.materialized_val_inference(), value):
            raise NetworkError(f"coremltools evaluates '{name}' to other numbers: report it.")
        function.replace_uses_of_var_after_op(
            anchor_op=made.op, old_var=constant.outputs[0], new_var=made, no_check_var_types=True
        )
        function.remove_ops([constant])
        exported.packed[name] = kind
        exported.decoded.pop(name, None)
    return exported


def _scopes_of(operation: Any) -> Any:
    """Return a context in which operations are written where another one comes from, as the package must say."""
    mil: Any = importlib.import_module("coremltools.converters.mil.mil")
    scope: Any = importlib.import_module("coremltools.converters.mil.mil.scope")
    return mil.Builder.scope(
        *(scope.ScopeInfo(source=source, data=data) for source, data in operation.scopes.items())
    )


class _Constant:
    """Writes one weight in front of the constant whose place it takes."""

    def __init__(self, constant: Any) -> None:
        mil: Any = importlib.import_module("coremltools.converters.mil.mil")
        self.builder, self.types = mil.Builder, mil.types
        self.at, self.name = constant, f"{constant.name}_made"

    def of(self, coded: CodedTensor) -> tuple[Any, str]:
        """Return the value of a weight and what makes it, or None and what Core ML has not."""
        channels, whole = coded.shape[0], coded.whole_numbers()
        if coded.num_groups not in (1, channels):
            return None, "codebooks of tiles"
        if coded.scales is not None and coded.scales.dim() == 2 and coded.shape[1] % coded.scales.shape[1]:
            return None, "scales of parts that are no whole inputs"
        if whole is not None:
            numbers, scales = whole
            bits = 4 if int(numbers.min()) >= -8 and int(numbers.max()) <= 7 else 8
            return self._scaled(self._numbers(numbers, f"int{bits}"), scales), f"int{bits} times a scale"
        if coded.num_components == 256 and coded.nonzeros < coded.codes.numel():
            return None, "256 values and zero"  # no code is left for zero
        value, kind = self._looked_up(coded)
        return (value if coded.scales is None else self._scaled(value, coded.scales)), kind

    def _looked_up(self, coded: CodedTensor) -> tuple[Any, str]:
        count, nonzeros, values = coded.codes.numel(), coded.nonzeros, coded.num_components
        zeros = nonzeros < count
        dense_bits = next(bits for bits in _BITS if values + zeros <= 2**bits)
        kept_bits = next(bits for bits in _BITS if values <= 2**bits)
        # Core ML has one table for the non-zeros of a sparse weight.
        if zeros and nonzeros and coded.num_groups == 1 and count + nonzeros * kept_bits < count * dense_bits:
            mask = self._numbers(coded.mask.to(torch.uint8), "uint1")
            codes = self._numbers(coded.codes[coded.mask], f"uint{kept_bits}")
            table = self._table(coded.codebook, kept_bits, len(coded.shape))
            places, kept = self.builder.constexpr_lut_to_sparse(
                indices_mask=mask,
                indices_nonzero_data=codes,
                lut=table,
                before_op=self.at,
                name=f"{self.name}_kept",
            )
            value = self.builder.constexpr_sparse_to_dense(
                nonzero_data=kept, mask=places, before_op=self.at, name=self.name
            )
            return value, f"non-zeros of {kept_bits} bits and their places"
        symbols, rows = coded.codes, coded.codebook
        if zeros:
            symbols, rows = (coded.codes + 1) * coded.mask, nn.functional.pad(rows, (1, 0))
        codes, table = (
            self._numbers(symbols, f"uint{dense_bits}"),
            self._table(rows, dense_bits, len(coded.shape)),
        )
        value = self.builder.constexpr_lut_to_dense(indices=codes, lut=table, before_op=self.at, name=self.name)
        return value, f"look-up of {dense_bits}-bit codes"

    def _scaled(self, value: Any, scales: Tensor) -> Any:
        shaped = scales.view(*scales.shape, *[1] * (len(value.shape) - scales.dim())).numpy()
        return self.builder.constexpr_blockwise_shift_scale(
            data=value, scale=shaped, before_op=self.at, name=f"{self.name}_scaled"
        )

    def _numbers(self, values: Tensor, kind: str) -> Any:
        """Return whole numbers as a dtype of coremltools, ``int4`` say."""
        return (
            values.contiguous().numpy().astype(self.types.nptype_from_builtin(self.types.string_to_builtin(kind)))
        )

    def _table(self, rows: Tensor, bits: int, dims: int) -> np.ndarray:
        """Return tables of ``2^bits`` values, ``[G, 1, ..., 2^bits, 1]``."""
        filled = nn.functional.pad(rows, (0, 2**bits - rows.shape[1]))
        return filled.view(len(rows), *[1] * (dims - 1), -1, 1).numpy()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what coremltools tells of versions, passes and a Mac that is not here off the user's screen."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # its bars have no switch
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
