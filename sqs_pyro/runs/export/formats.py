"""What a network can be exported to: how each format is written, run and told from other files."""

import copy
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sqs_pyro import integrations
from sqs_pyro.errors import OutputError
from sqs_pyro.exporting.aoti import export_aoti, run_aoti
from sqs_pyro.exporting.coreml import export_coreml, is_coreml_export
from sqs_pyro.exporting.dense import DTYPES, export_dense, is_dense_export
from sqs_pyro.exporting.executorch import export_executorch, is_executorch_export, run_executorch
from sqs_pyro.exporting.exported import Exported
from sqs_pyro.exporting.installed import check_installed
from sqs_pyro.exporting.onnx import export_onnx, is_onnx_export, run_onnx
from sqs_pyro.exporting.openvino import export_openvino, run_openvino
from sqs_pyro.exporting.suffixes import is_one_file
from sqs_pyro.exporting.torchao import export_torchao, is_torchao_export
from sqs_pyro.exporting.trace import outputs
from sqs_pyro.integrations.checkpoint_size import checkpoint_size
from sqs_pyro.integrations.compressed_tensors_checkpoint import save_compressed_tensors
from sqs_pyro.integrations.gguf_checkpoint import is_gguf_export, write_gguf
from sqs_pyro.integrations.pretrained import quiet, transformers_package
from sqs_pyro.kernels.placing import unpack_weights
from sqs_pyro.packing.stored import stored_weights
from sqs_pyro.runs.seal import is_our_directory, seal

#: A network of the export: from a minibatch to its outputs.
Run = Callable[[Any], tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class Source:
    """What is exported.

    Attributes:
        path: packed file, or packed Hugging Face directory.
        net: its network.
        inputs: an example of a minibatch, two rows or more; None where the format needs none and there is none.
        dtype: of what has no codes, where the format leaves the choice.
    """

    path: Path
    net: nn.Module
    inputs: Any
    dtype: str


class Format(ABC):
    """A format, by the name that ``sqs export --format`` has for it."""

    name: ClassVar[str]
    #: What it needs beside what is always there.
    packages: ClassVar[tuple[str, ...]] = ()
    #: Whether it is made from an example.
    needs_example: ClassVar[bool] = True
    #: Whether it is made of Hugging Face directories alone.
    of_directories: ClassVar[bool] = False
    #: Whether the user may choose the dtype of what has no codes.
    has_dtype: ClassVar[bool] = False

    def check(self, dtype: str | None) -> None:
        """Check what can be checked before a network is read.

        Raises:
            OutputError: a dtype, of a format that has none to choose.
            MissingPackageError: a package is not installed.
        """
        if dtype is not None and not self.has_dtype:
            having = " or ".join(f"--format {name}" for name, each in FORMATS.items() if each.has_dtype)
            raise OutputError(f"--dtype {dtype} is for {having}, but the format is {self.name}: leave it out.")
        check_installed(self.name, *self.packages)

    def is_directory(self, path: Path) -> bool:
        """Return whether what is written of a file or directory is a directory, by its name."""
        return not is_one_file(self.name)

    def check_source(self, path: Path) -> None:
        """Check that the format can be made of a packed file, or of a packed Hugging Face directory.

        Raises:
            OutputError: it cannot.
        """
        if self.of_directories and not path.is_dir():
            raise OutputError(
                f"Format {self.name} is made of a packed Hugging Face directory, but '{path}' is a file: give the "
                "directory hugging_face of its run."
            )

    def is_ours(self, out: Path) -> bool:
        """Return whether something was written by an export of this format, into a directory."""
        return is_our_directory(out)

    @abstractmethod
    def write(self, source: Source, made: Path) -> tuple[Exported, Run | None]:
        """Write a network; return what is in it, and what runs it from what was written, if anything does here."""


class Dense(Format):
    """A plain checkpoint: a file of safetensors, of a Hugging Face directory a plain one."""

    name, needs_example, has_dtype = "dense", False, True

    def is_directory(self, path: Path) -> bool:
        """Return whether the checkpoint is one."""
        return path.is_dir()

    def is_ours(self, out: Path) -> bool:
        """Return whether a dense export is there."""
        return is_our_directory(out) if out.is_dir() else is_dense_export(out)

    def write(self, source: Source, made: Path) -> tuple[Exported, Run]:
        """Write weights as numbers."""
        if source.path.is_dir():
            plain = _plain_checkpoint(source, made)
            exported = Exported(
                decoded=dict.fromkeys(stored_weights(source.net), "a plain checkpoint has no codes")
            )
        else:
            exported = export_dense(source.net, made, source.dtype)
            # A copy of the packed network's form, filled from the file alone: `strict` finds what is missing.
            plain = unpack_weights(copy.deepcopy(source.net))
            plain.load_state_dict(load_file(made), strict=True)
        return exported, lambda inputs: outputs(plain, inputs)


class AOTI(Format):
    """A compiled network on packed weights."""

    name = "aoti"

    def write(self, source: Source, made: Path) -> tuple[Exported, Run]:
        """Compile."""
        exported = export_aoti(source.net, source.inputs, made)
        seal(made)
        return exported, lambda inputs: run_aoti(made, inputs)


class ONNX(Format):
    """A model of codes and codebooks."""

    name, packages = "onnx", ("onnx", "onnxscript", "onnxruntime")

    def is_ours(self, out: Path) -> bool:
        """Return whether a model of ours is there."""
        return is_onnx_export(out)

    def write(self, source: Source, made: Path) -> tuple[Exported, Run]:
        """Write a model."""
        return export_onnx(source.net, source.inputs, made), lambda inputs: run_onnx(made, inputs)


class QuantizedONNX(ONNX):
    """The same, in which convolutions, too, keep whole numbers while they run."""

    name = "onnx-qdq"

    def write(self, source: Source, made: Path) -> tuple[Exported, Run]:
        """Write a model."""
        exported = export_onnx(source.net, source.inputs, made, quantized=True)
        return exported, lambda inputs: run_onnx(made, inputs)


class OpenVINO(Format):
    """A network of OpenVINO."""

    name, packages = "openvino", ("onnx", "onnxscript", "openvino")

    def write(self, source: Source, made: Path) -> tuple[Exported, Run]:
        """Write a network and its weights."""
        exported = export_openvino(source.net, source.inputs, made)
        seal(made)
        return exported, lambda inputs: run_openvino(made, inputs)


class CoreML(Format):
    """A package of Core ML, which runs on Apple's systems alone."""

    name, packages = "coreml", ("coremltools",)

    def is_ours(self, out: Path) -> bool:
        """Return whether a package of ours is there."""
        return is_coreml_export(out)

    def write(self, source: Source, made: Path) -> tuple[Exported, Run | None]:
        """Write a package; its weights are compared, its outputs cannot be."""
        return export_coreml(source.net, source.inputs, made), None


class TorchAO(Format):
    """A state dict of torchao's tensors."""

    name, packages, needs_example = "torchao", ("torchao",), False

    def is_ours(self, out: Path) -> bool:
        """Return whether a state dict of ours is there."""
        return is_torchao_export(out)

    def write(self, source: Source, made: Path) -> tuple[Exported, Run]:
        """Write whole numbers and their scales, and load them as torchao's users do."""
        exported = export_torchao(source.net, made)
        plain = unpack_weights(copy.deepcopy(source.net))
        plain.load_state_dict(torch.load(made, weights_only=True), strict=True, assign=True)
        return exported, lambda inputs: outputs(plain, inputs)


class ExecuTorch(Format):
    """A program of ExecuTorch."""

    name, packages = "executorch", ("executorch",)

    def is_ours(self, out: Path) -> bool:
        """Return whether a program of ours is there."""
        return is_executorch_export(out)

    def write(self, source: Source, made: Path) -> tuple[Exported, Run]:
        """Write a program."""
        exported = export_executorch(source.net, source.inputs, made)
        return exported, lambda inputs: run_executorch(made, inputs)


class CompressedTensors(Format):
    """A checkpoint of compressed-tensors."""

    name, packages = "compressed-tensors", ("transformers", "compressed_tensors")
    needs_example, of_directories, has_dtype = False, True, True

    def write(self, source: Source, made: Path) -> tuple[Exported, Run]:
        """Write whole numbers and their scales."""
        dense = _plain(source.path, source.dtype)
        with quiet(transformers_package(), source.path):
            packed = save_compressed_tensors(source.net, dense, made)
        _copy_besides(source.path, made)
        seal(made)
        with quiet(transformers_package(), made):
            loaded = type(dense).from_pretrained(made).eval()
        why = f"no linear layer of whole numbers: {source.dtype}"
        return _exported(source.net, packed, why), lambda inputs: outputs(loaded, inputs)


class GGUF(Format):
    """A file for llama.cpp."""

    name, packages, needs_example, of_directories = "gguf", ("transformers", "gguf"), False, True

    def is_ours(self, out: Path) -> bool:
        """Return whether a file of ours is there."""
        return is_gguf_export(out)

    def write(self, source: Source, made: Path) -> tuple[Exported, Run]:
        """Write whole numbers in blocks, and the tokenizer."""
        dense = _plain(source.path, "float32")
        transformers = transformers_package()
        with quiet(transformers, source.path):
            # A directory without a tokenizer is a network of ids.
            has_words = (source.path / "tokenizer.json").exists()
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.path) if has_words else None
            written = made.with_suffix(".gguf")  # transformers knows the format by its name alone
            packed = write_gguf(source.net, dense, tokenizer, written)
            loaded = type(dense).from_pretrained(written.parent, gguf_file=written.name).eval()
            written.rename(made)
        why = "no whole numbers, or rows of no multiple of 32: float16"
        return _exported(source.net, packed, why), lambda inputs: outputs(loaded, inputs)


FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        Dense(),
        AOTI(),
        ONNX(),
        QuantizedONNX(),
        OpenVINO(),
        CoreML(),
        TorchAO(),
        ExecuTorch(),
        CompressedTensors(),
        GGUF(),
    )
}


def _exported(net: nn.Module, packed: dict[str, str], why: str) -> Exported:
    """Return what became of each compressed parameter; of those that lost their codes, why."""
    return Exported(packed, {name: why for name in stored_weights(net) if name not in packed})


def _plain_checkpoint(source: Source, made: Path) -> nn.Module:
    """Write a plain Hugging Face directory, with the tokenizer of the packed one; return what it loads as."""
    dense = _plain(source.path, source.dtype)
    with quiet(transformers_package(), source.path):
        dense.save_pretrained(made)
    _copy_besides(source.path, made)
    seal(made)
    with quiet(transformers_package(), made):
        return type(dense).from_pretrained(made).eval()


def _plain(path: Path, dtype: str) -> Any:
    """Return the plain model of a packed Hugging Face directory."""
    with quiet(transformers_package(), path):
        return integrations.from_pretrained(path, dequantize=True, dtype=DTYPES[dtype])


def _copy_besides(path: Path, made: Path) -> None:
    """Copy what a packed Hugging Face directory has beside weights and configuration, such as the tokenizer."""
    for beside in checkpoint_size(path).besides:
        if beside != "README.md":  # which says how to load packed weights
            shutil.copyfile(path / beside, made / beside)
