"""Other quantizers of one weight matrix, dequantised, with their honest bits a weight; for the benchmarks' tables.

Each is a function without arguments that gives `(apply, bits)`, and raises ImportError where its library is
missing: `apply` maps a layer's name and weight ``[outputs, inputs]`` to the weight that the method would compute
with. Scales and zero points count: 16 bits for a scale, the codes' bits for a zero point on the grid.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sqs_pyro.networks.architectures import architecture_of, blocks, linear_layers

Method = Callable[[], tuple[Callable[[str, Tensor], Tensor], float]]


def compressed_layers(net: nn.Module) -> dict[str, nn.Linear]:
    """Of all blocks, by their names in the network."""
    architecture = architecture_of(net)
    inside = {layer for block in blocks(net) for layer in linear_layers(block, architecture).values()}
    return {name: layer for name, layer in net.named_modules() if layer in inside}  # type: ignore[misc]


@contextmanager
def weights_changed(layers: Mapping[str, nn.Linear], apply: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Layers with the weights of another method, until the end of the block."""
    kept = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    try:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(apply(name, kept[name]))
        yield
    finally:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(kept[name])


@torch.no_grad()
def round_to_nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """An asymmetric even grid for each group of inputs of each output."""
    parts = weight.reshape(len(weight), -1, group)
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).half().float().clamp(min=1e-8)
    zero = (-low / step).round()
    return (((parts / step).round() + zero).clamp(0, 2**bits - 1) - zero).mul(step).view_as(weight)


def rounded(bits: int, group: int) -> Method:
    return lambda: (lambda _, weight: round_to_nearest(weight, bits, group), bits + (16 + bits) / group)


def nf4(block: int = 64, *, double: bool = False) -> Method:
    """bitsandbytes, with float32 scales as it computes them, or those rounded to 8 bits in blocks of 256."""

    def make() -> tuple[Callable[[str, Tensor], Tensor], float]:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        def apply(_: str, weight: Tensor) -> Tensor:
            parts = quantize_4bit(weight, blocksize=block, quant_type="nf4", compress_statistics=double)
            return dequantize_4bit(*parts)

        return apply, 4 + (8 + 32 / 256 if double else 32) / block

    return make


def hqq(bits: int, group: int) -> Method:
    """Half-quadratic quantization: scale and zero point of 16 bits each."""

    def make() -> tuple[Callable[[str, Tensor], Tensor], float]:
        from hqq.core.quantize import Quantizer

        def apply(_: str, weight: Tensor) -> Tensor:
            parts = Quantizer.quantize(
                weight,
                nbits=bits,
                group_size=group,
                optimize=True,
                device="cpu",
                axis=1,
                compute_dtype=weight.dtype,
            )
            return Quantizer.dequantize(*parts).to(weight)

        return apply, bits + 32 / group

    return make


def gptq(python: Path | None, calibration: Path, bits: int, group: int, packages: Path | None) -> Method:
    """GPTQ of llm-compressor on the same sequences, made by the interpreter of an environment that has it."""

    def make() -> tuple[Callable[[str, Tensor], Tensor], float]:
        if python is None:
            raise ImportError("--gptq names no environment with llm-compressor")
        target = calibration.with_name(f"gptq-{bits}-{group}-{calibration.stem}.safetensors")
        weights = _made_elsewhere(python, "gptq_weights.py", calibration, target, bits, group, packages)
        return lambda name, _: weights[name], bits + (16 + bits) / group

    return make


def autoround(
    python: Path | None,
    calibration: Path,
    bits: int,
    group: int,
    packages: Path | None,
    *,
    iterations: int,
    blocks: Sequence[int] = (),
) -> Method:
    """AutoRound on the same sequences, likewise; of some blocks, or of all where none is named."""

    def make() -> tuple[Callable[[str, Tensor], Tensor], float]:
        if python is None:
            raise ImportError("--autoround names no environment with auto-round")
        parts = "-".join(map(str, (bits, group, iterations, *blocks)))
        target = calibration.with_name(f"autoround-{parts}-{calibration.stem}.safetensors")
        further = ["--iterations", str(iterations), "--blocks", *map(str, blocks)]
        weights = _made_elsewhere(
            python, "autoround_weights.py", calibration, target, bits, group, packages, further
        )
        return lambda name, _: weights[name], bits + (16 + bits) / group

    return make


def _made_elsewhere(
    python: Path,
    script: str,
    calibration: Path,
    target: Path,
    bits: int,
    group: int,
    packages: Path | None,
    further: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Return the weights of a method that another environment has, by the script that writes them once."""
    if not target.exists():
        options = ["--bits", str(bits), "--group", str(group), "--threads", str(torch.get_num_threads()), *further]
        options += [] if packages is None else ["--packages", str(packages)]
        path = {"PYTHONPATH": str(Path(__file__).parents[1])}
        command = [python, Path(__file__).with_name(script), calibration, target, *options]
        subprocess.run(command, check=True, env=path, stdout=sys.stderr)
    return load_file(target)
