"""What kernels take of a GPU, by compiling them for it ahead of time: no GPU takes part, no time is measured."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sqs_pyro.kernels.decode import PackedArgs, decoded_weights, write_scales, write_table
from sqs_pyro.kernels.gpu import cuda
from sqs_pyro.kernels.gpu.dispatch import CHUNK
from sqs_pyro.kernels.gpu.launch import Launch, decoding, product, weight_of
from sqs_pyro.packing.bits import packed_size

#: Shared memory that a block may have, in bytes: CUDA C++ Programming Guide, technical specifications.
SHARED_LIMIT = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024}

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?[A-Z]", re.MULTILINE)


def blank(shape: tuple[int, int], bits: int, form: str = "dense", groups: int = 1, parts: int = 0) -> PackedArgs:
    """Return a packed weight without content, on the CPU, whose kernels can be compiled."""
    numel, bitmap = shape[0] * shape[1], form == "bitmap"
    codes = torch.zeros(packed_size(numel, bits), dtype=torch.uint8)
    mask = torch.zeros(packed_size(numel, 1), dtype=torch.uint8) if bitmap else None
    scales = write_scales(torch.zeros(shape[0], parts)) if parts else None
    packed = PackedArgs(codes, write_table(torch.zeros(groups, 2**bits)), mask, shape, bits, scales, form)
    if bitmap:
        ranks = torch.zeros(shape[0], triton.cdiv(shape[1], CHUNK), dtype=torch.int64)
        # Made here: computing them would take a GPU.
        decoded_weights.kept(packed, "ranks", lambda _: ranks)
    return packed


def launches(packed: PackedArgs, rows: int, dtype: torch.dtype) -> Iterator[Launch]:
    """Yield the kernels of a product with ``rows`` rows, by Triton, or of decoding rows."""
    weight = weight_of(packed)
    x, out = torch.empty(rows, weight.inputs, dtype=dtype), torch.empty(rows, weight.outputs, dtype=dtype)
    chosen = weight.plan(x)
    if chosen.kernel == "decode":
        yield from decoding(weight, torch.zeros(1, dtype=torch.int64), x[:1])
    else:
        yield from product(weight, x, None, out, chosen)


def compiled_triton(launch: Launch, architecture: str) -> dict[str, Any]:
    """Compile for an architecture, ``"90"`` say, as the launch would; returns what the kernel takes."""
    names = launch.kernel.arg_names
    # Triton's own (num_warps, num_stages), which are no arguments of the kernel.
    options = {name: value for name, value in launch.constants.items() if name.startswith("num_")}
    constants = {name: value for name, value in launch.constants.items() if name not in options}
    types, attributes = {}, {}
    fixed = {parameter.name for parameter in launch.kernel.params if parameter.do_not_specialize}
    for place, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        # As Triton specialises at a launch: 1 is a constant, multiples of 16 and all pointers are known to be
        # such.
        if isinstance(value, int) and value == 1 and name not in fixed:
            constants[name] = 1
        elif isinstance(value, Tensor) or (value % 16 == 0 and name not in fixed):
            attributes[(place,)] = [["tt.divisibility", 16]]
        types[name] = _TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=places, attrs=attributes)
    found = triton.compile(source, target=GPUTarget("cuda", int(architecture), 32), options=options)
    return {"shared_bytes": found.metadata.shared, **_usage(found.asm["cubin"])}  # Triton's is dynamic


def compiled_cuda(architecture: str) -> dict[str, dict[str, Any]]:
    """Compile the CUDA C++ kernels; returns what each takes, by its name ``"bf16, 4 bits, 8 rows"``.

    ``cubin_bytes`` is of the file that holds all of them.

    Raises:
        RuntimeError: there is no nvcc, or it failed; the message has what it said.
    """
    nvcc = cuda.nvcc_command(architecture)
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "dense.cubin"
        command = [*nvcc, "-cubin", "-Xptxas", "-v", str(cuda.SOURCE), "-o", str(cubin)]
        told = subprocess.run(command, capture_output=True, text=True)
        if told.returncode:
            raise RuntimeError(f"nvcc failed: {told.stderr}")
        size = cubin.stat().st_size
    # What ptxas says of each instance, by its mangled name: dtype, bits, groups of rows, tiles.
    entry = re.compile(
        r"multiplyI(\d+\w+?)Li(\d)ELi(\d)ELi\dEEE.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers.*?(\d+) bytes smem",
        re.DOTALL,
    )
    found = {}
    for dtype, bits, groups, _, stores, loads, registers, shared in entry.findall(told.stderr):
        name = f"{'bf16' if 'bfloat16' in dtype else 'fp16'}, {bits} bits, {8 * int(groups)} rows"
        found[name] = {
            "registers": int(registers),
            "shared_bytes": int(shared),
            "spilled_bytes": int(stores) + int(loads),
            "cubin_bytes": size,
        }
    return found


def _usage(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        told = _told(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
        listing = _told(triton.knobs.nvidia.nvdisasm.path, "-c", str(path))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    assert found is not None
    registers, stack, local = map(int, found.groups())
    return {
        "registers": registers,
        "spilled_bytes": stack + local,
        "cubin_bytes": len(cubin),
        "instructions": len(_OPCODE.findall(listing)),
    }


def _told(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
