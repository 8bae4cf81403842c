"""Whether the fast tests notice faults: each of some small ones, one a room, in a copy of the library.

``python tests/mutants.py`` puts one fault after the other into a copy and runs the fast tests that should fail,
until the first one does. A fault that none notices ends it with 1.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
_FAILED = 1  # pytest's exit code for tests that failed, unlike 2 to 5: it did not get that far


class Fault(NamedTuple):
    """Other text at one place of the library, and the tests, below ``tests``, that should notice it."""

    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


FAULTS = {
    "a sign of a KL bound": Fault(
        "distributions/kl.py",
        "return expected - q.assignment_entropy if",
        "return expected + q.assignment_entropy if",
        ("distributions",),
    ),
    "one byte too many of packed bits": Fault(
        "packing/bits.py", "(count * bits + 7) // 8", "(count * bits + 8) // 8", ("packing",)
    ),
    "weights at the threshold of pruning": Fault(
        "inference/largest.py", "keep = values > threshold", "keep = values >= threshold", ("inference",)
    ),
    "batch norms that are not folded": Fault(
        "shipping/batch_norm.py", "            _fold(module, *own)\n", "            pass\n", ("shipping",)
    ),
    "the axis of the classes": Fault(
        "models/likelihoods/classes.py",
        "rows = logits.movedim(axis, -1)",
        "rows = logits.movedim(1, -1)",
        ("models",),
    ),
    "a resumption with other data": Fault(
        "fingerprint.py", '"data": dict(data),', '"data": {},', ("compression/test_kept_state.py",)
    ),
    "a checksum that is not looked at": Fault(
        "packing/file.py", "    if not intact:", "    if False:", ("packing/test_file.py",)
    ),
    "random states that are not put back": Fault(
        "isolation.py", "        pyro.util.set_rng_state(before)\n", "", ("test_isolation.py",)
    ),
    "a sum of an ensemble for its average": Fault(
        "networks/drawn.py",
        "every.logsumexp(0) - math.log(len(every))",
        "every.logsumexp(0)",
        ("evaluation/test_averaging.py",),
    ),
    "an exit code": Fault(
        "cli/running.py", "TERMINATED = 2, 130, 143", "TERMINATED = 1, 130, 143", ("test_cli.py",)
    ),
    "bits of compiled products' codes": Fault(
        "kernels/cpu/codes.h", "kPairs = 16 / B;", "kPairs = 15 / B;", ("kernels/test_matrices.py",)
    ),
    "a column of compiled convolutions": Fault(
        "kernels/cpu/geometry.h",
        "residue + padding - tap * dilation : tap * dilation;",
        "residue + padding - tap * dilation : tap;",
        ("kernels/test_convolution.py",),
    ),
    "older machines' look-up of 4 bits": Fault(
        "kernels/cpu/codes.h", "(__m256)(index << 28)", "(__m256)(index << 27)", ("kernels/test_native.py",)
    ),
    "the bias of interpreted GPU products": Fault(
        "kernels/gpu/triton_kernels.py",
        "sums = sums + tl.load(bias + columns)",
        "sums = sums - tl.load(bias + columns)",
        ("kernels/test_gpu_interpreted.py",),
    ),
    "scales of a graph for others": Fault(
        "exporting/onnx_weights.py",
        'value = self._op(at, "Mul", value, self._floats("scales", scales))',
        'value = self._op(at, "Div", value, self._floats("scales", scales))',
        ("exporting/test_onnx.py",),
    ),
    "a KL for each shard": Fault(
        "compression/finetune/shards.py",
        "with_kl and shard == 0",
        "with_kl",
        ("compression/finetune/test_shards.py",),
    ),
    "particles that are not averaged": Fault(
        "inference/elbo.py",
        "_negative_log_likelihood(model_trace) / self.num_particles",
        "_negative_log_likelihood(model_trace)",
        ("inference/test_elbo.py",),
    ),
}


def main() -> int:
    """Put in the faults that are asked for, all without a name, and tell which were noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of faults, in full")
    names = parser.parse_args().names or list(FAULTS)
    unnoticed = [name for name in names if not noticed(name)]
    print(f"{len(names) - len(unnoticed)} of {len(names)} faults were noticed")
    return 1 if unnoticed else 0


def noticed(name: str) -> bool:
    """Run the tests of one fault; print its name and the test that failed first."""
    fault = FAULTS[name]
    with tempfile.TemporaryDirectory() as made:
        copy = Path(made)
        for part in ("sqs_pyro", "tests", "recipes", "docs", "pyproject.toml", "README.md"):
            original = ROOT / part
            (shutil.copytree if original.is_dir() else shutil.copy)(original, copy / part)
        path = copy / "sqs_pyro" / fault.file
        path.write_text(mutated(path.read_text(), fault))
        command = [sys.executable, "-m", "pytest", "-m", "not slow", "-x", "-p", "no:cacheprovider"]
        environment = {**os.environ, "PYTHONPATH": str(copy), "SQS_CACHE": str(copy / "cache")}
        paths = [f"tests/{test}" for test in fault.tests]
        done = subprocess.run([*command, *paths], cwd=copy, env=environment, capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print(f"{name}: {failed[0][:100] if failed else 'not noticed'}", flush=True)
    if done.returncode not in (0, _FAILED):
        print(done.stdout[-2000:] + done.stderr[-2000:])
    return done.returncode == _FAILED


def mutated(content: str, fault: Fault) -> str:
    """The file with the fault in it.

    Raises:
        ValueError: its place is not there, or not the only one.
    """
    if content.count(fault.right) != 1:
        raise ValueError(f"{fault.file} has {fault.right!r} {content.count(fault.right)} times, not once")
    return content.replace(fault.right, fault.wrong)


if __name__ == "__main__":
    sys.exit(main())
