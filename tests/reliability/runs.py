"""Runs to kill: each as small as it can be, in a process forked from one that has imported everything."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
import transformers
from matplotlib.figure import Figure

from sqs_pyro import compress_transformer, save
from sqs_pyro.errors import SQSError
from sqs_pyro.recipes import parse
from sqs_pyro.runs.export import export_file
from sqs_pyro.runs.images import run
from sqs_pyro.runs.recipe import RunRecipe
from sqs_pyro.studies.recipe import StudyRecipe
from sqs_pyro.studies.study import run_study, write_summary

# What is imported only when it is needed was three quarters of a run, and of the moments at which it is killed.
for late in ("sklearn.datasets", "torchvision", "torch._dynamo", "transformers.models.llama.modeling_llama"):
    importlib.import_module(late)

_paint = Figure.savefig
Figure.savefig = lambda _, place, **options: _paint(Figure(figsize=(1, 1)), place)  # half of the time of a run

REFUSED = 2
Outcome = tuple[set[str], dict[str, bytes]]
_RECIPE = {
    "data": {"name": "digits", "batch_size": 256},
    "network": {"name": "digits_net", "options": {"width": 4}},
    "baseline": {"epochs": 2},
    "compression": {"epochs": 4, "num_components": 2, "nonzero_rate": 0.4, "batch_norm_batches": 1},
    "bounds": None,
}


@dataclass(frozen=True)
class Run:
    """Something that is killed and then done again.

    Attributes:
        work: does all of it in a directory, from what is there already.
        compared: pattern of the files that must be equal to the byte; of all others only the names must be.
    """

    work: Callable[[Path], object]
    compared: str


def _compress(out: Path) -> None:
    if not (out / "run").exists():
        run(parse(RunRecipe, _RECIPE), out / "run")


def _blockwise(out: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=32, pad_token_id=0)).eval()
    sequences = torch.randint(32, (8, 12), generator=torch.Generator().manual_seed(0))
    keys = {"bits": 4.0, "batch_size": 4, "settle_steps": 4, "importance_sequences": 4, "finish_steps": 24}
    save(compress_transformer(net, sequences, keys, directory=out / "blocks").network, out / "packed")


def _compare(out: Path) -> None:
    base = {key: value for key, value in _RECIPE.items() if key != "name"}
    variants = {"a": {}, "b": {"set": {"compression.nonzero_rate": 0.2}}}
    study = parse(StudyRecipe, {"name": "small", "base": base, "variants": variants})
    write_summary("compare", study, run_study(study, out / "study"), out / "study")


def _export(out: Path) -> None:
    export_file(out.parent / "packed.safetensors", "dense", out / "dense", input_shape=(1, 8, 8), overwrite=True)


RUNS = {
    "compress": Run(_compress, "**/packed.safetensors"),
    "blockwise": Run(_blockwise, "packed"),
    "compare": Run(_compare, "**/packed.safetensors"),
    "export": Run(_export, "dense"),
}


def start(work: Callable[[], object]) -> int:
    """Fork a process that does some work and ends with 0, with 2 after one sentence, or with 1."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        work()
        code = 0
    except SQSError as error:
        print(f"  {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        code = REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(process: int) -> int:
    """Wait for a process; its code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def outcome(each: Run, out: Path) -> Outcome:
    """Names of all files and directories, and the bytes of those that are compared."""
    names = {str(path.relative_to(out)) for path in out.rglob("*")}
    return names, {str(path.relative_to(out)): path.read_bytes() for path in out.glob(each.compared)}


def make_packed(path: Path) -> None:
    """The packed file that is exported."""
    directory = path.parent / "for-export"
    run(parse(RunRecipe, _RECIPE), directory / "run")
    (directory / "run" / "packed.safetensors").rename(path)


def difference(expected: Outcome, found: Outcome) -> str | None:
    """What is left over, missing or of other bytes."""
    if expected[0] != found[0]:
        return f"left over {sorted(found[0] - expected[0])}, missing {sorted(expected[0] - found[0])}"
    if expected[1] != found[1]:
        return f"other bytes in {[name for name in expected[1] if expected[1][name] != found[1][name]]}"
    return None
