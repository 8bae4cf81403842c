"""How long packed networks take on this machine, beside the same networks dense: ``sqs bench model``.

One call of a network after another, the methods in turn in one process, all of them compiled alike by
``torch.compile(fullgraph=True)`` for the shape at hand. Medians, of two kinds:

* warm: a call that is not measured comes right before, so caches hold what fits of weights and code;
* cold: a walk through more memory than caches hold comes right before, so weights come from memory, as they do
  where something else runs between two calls. It needs one copy of a network only, which is compiled once for each
  method, but it drives out code as well: cold calls pay for both, in all methods alike.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.bench.networks import BenchNetwork
from sqs_pyro.bench.report import NF4, PEER_ERRORS, cold_bytes, nf4_linear, spread, torch_threads
from sqs_pyro.errors import NetworkError, RecipeError, first_line
from sqs_pyro.evaluation.latency import Call, finished, interleaved
from sqs_pyro.kernels.decode import decoded_weights
from sqs_pyro.kernels.placing import unpack_weights
from sqs_pyro.kernels.processor import multiplies_bfloat16
from sqs_pyro.kernels.weight import PackedWeight
from sqs_pyro.networks.calling import call_arguments, move_to, output_tensor, predictions
from sqs_pyro.runs.bookkeeping import chosen_device, gpu, machine

_SINGLE, _HALF = torch.float32, torch.bfloat16
#: How far outputs may be from those of the packed network in float32, relative to these. NF4 has other weights.
_TOLERANCES = {"float32": 1e-3, "packed, float32": 1e-3, "bfloat16": 0.25, "packed, bfloat16": 0.25}


def bench_model(
    networks: Sequence[BenchNetwork],
    batches: Sequence[int] = (1, 32),
    threads: int = 1,
    rounds: int = 30,
    *,
    compiled: bool = True,
    progress: Callable[[str], None] = lambda line: None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure; return a plain document.

    Args:
        networks: to measure, in turn; they are left in eval mode.
        batches: examples of a call.
        threads: that torch may use.
        rounds: calls of each method, cold and warm.
        compiled: whether by ``torch.compile``, or as they are.
        progress: told of each network, shape and batch as it begins.
        device: where they run: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"`` or ``"auto"``.

    Raises:
        RecipeError: a number below one, no network, or no such device.
        NetworkError: a network does not take its input, cannot be compiled in one piece, or a method's outputs are
            not those of the packed network in float32.
    """
    sizes = [threads, rounds, *batches, *[n for bench in networks for shape in bench.shapes for n in shape]]
    if not networks or not batches or min(sizes) < 1:
        raise RecipeError("A benchmark needs a network, and inputs, batches, threads and rounds of at least 1.")
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    place = chosen_device(device)
    with torch_threads(threads), torch.inference_mode():
        # Ones, because untouched zeros would all be one page.
        walk = finished(torch.ones(cold_bytes() // 4, device=place).sum, place)
        for bench in networks:
            with torch.inference_mode(False):  # parameters that are moved stay parameters
                bench.network.to(place)
            methods, absent = _methods(bench.network, place)
            missing |= {f"{name}, {bench.name}": why for name, why in absent.items()}
            for shape, batch in itertools.product(bench.shapes, batches):
                title = f"{bench.name}, {'x'.join(map(str, shape))}, batch {batch}"
                progress(title)
                calls, errors, absent = _checked_calls(bench, methods, shape, batch, compiled, place)
                missing |= {f"{name}, {title}": why for name, why in absent.items()}
                about = {"network": bench.name, "input": list(shape), "batch": batch}
                held = {name: held_bytes(methods[name][1]) for name in calls}
                for cold in (True, False):
                    # A walk reads every line of it, which drives out all else.
                    before = (lambda call: walk()) if cold else (lambda call: call())
                    times = {name: spread(taken) for name, taken in interleaved(calls, rounds, before).items()}
                    rows += [
                        {
                            **about,
                            "cold": cold,
                            "method": name,
                            **found,
                            "times_as_fast": times["float32"]["microseconds"] / found["microseconds"],
                            "relative_error": errors[name],
                            "bytes": held[name],
                        }
                        for name, found in times.items()
                    ]
        made_on = {"machine": _machine(place), "device": str(place), "rounds": rounds, "compiled": compiled}
        return {**made_on, "missing": missing, "rows": rows}


def _machine(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return machine()
    with torch.cuda.device(device):
        return gpu()


def held_bytes(net: nn.Module) -> int:
    """Count bytes of a network's tensors in memory, with decoded copies of packed weights, and NF4's scales."""
    # By identity: tied weights are held once.
    tensors = {id(tensor): tensor for tensor in itertools.chain(net.parameters(), net.buffers())}
    for state in filter(None, (getattr(parameter, "quant_state", None) for parameter in net.parameters())):
        tensors |= {id(value): value for value in vars(state).values() if isinstance(value, Tensor)}
    copies = [decoded_weights.num_bytes(m.codes) for m in net.modules() if isinstance(m, PackedWeight)]
    return sum(tensor.nbytes for tensor in tensors.values()) + sum(copies)


def _methods(
    packed: nn.Module, device: torch.device
) -> tuple[dict[str, tuple[torch.dtype, nn.Module]], dict[str, str]]:
    """Return networks by method, all with the packed one's weights; and why a method is not there."""
    # The same values everywhere, so that outputs can be compared before anything is timed.
    dense = unpack_weights(copy.deepcopy(packed), _SINGLE).eval()
    made = {"float32": (_SINGLE, dense)}
    missing: dict[str, str] = {}
    if multiplies_bfloat16(device):
        made["bfloat16"] = _HALF, copy.deepcopy(dense).to(_HALF)
        try:
            made[NF4] = _HALF, _nf4(made["bfloat16"][1])
        except PEER_ERRORS as error:
            missing[NF4] = first_line(error)
    else:  # a call would take ten times as long as in float32
        missing |= dict.fromkeys(("bfloat16", NF4), "the processor has no instructions for bfloat16")
    made["packed, float32"] = _SINGLE, packed
    made["packed, bfloat16"] = _HALF, copy.deepcopy(packed).to(_HALF)
    return made, missing


def _nf4(dense: nn.Module) -> nn.Module:
    """Put layers of bitsandbytes in place of linear ones, but for those that share an embedding's weight."""
    net = copy.deepcopy(dense)
    embeddings = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding)}
    linears = {id(m): m for m in net.modules() if type(m) is nn.Linear and id(m.weight) not in embeddings}
    held = sum(m.weight.numel() for m in linears.values()) / sum(p.numel() for p in net.parameters())
    if held < 0.5:  # a figure called NF4 would be one of the dense rest
        raise ValueError(f"only linear layers can have it, and these hold {held:.1%} of the weights.")
    for module in list(net.modules()):
        for name, child in module._modules.items():
            if id(child) in linears:
                module._modules[name] = nf4_linear(linears[id(child)])
    return nf4_linear(linears[id(net)]) if id(net) in linears else net


def _checked_calls(
    bench: BenchNetwork,
    methods: dict[str, tuple[torch.dtype, nn.Module]],
    shape: tuple[int, ...],
    batch: int,
    compiled: bool,
    device: torch.device,
) -> tuple[dict[str, Call], dict[str, float], dict[str, str]]:
    """Return each method's call, its error against the packed network in float32; why a method is not there."""
    torch._dynamo.reset()  # code for other shapes would be looked through at each call
    try:
        wanted = predictions(bench.network, move_to(bench.inputs(shape, batch, _SINGLE), device)).float()
    except (RuntimeError, IndexError, TypeError) as error:
        raise NetworkError(
            f"Network '{bench.name}' does not take inputs of shape {(batch, *shape)} ({first_line(error)}): give "
            "the shape of one of its examples with --input-shape or --lengths."
        ) from None
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, (dtype, net) in methods.items():
        call = finished(_call(net, move_to(bench.inputs(shape, batch, dtype), device), compiled), device)
        try:
            output = output_tensor(call()).float()
        except PEER_ERRORS as error:
            if name == NF4:
                missing[name] = first_line(error)
                continue
            raise NetworkError(
                f"Network '{bench.name}' fails, {name} ({first_line(error)}): if it cannot be compiled in one "
                "piece, measure it as it is with --eager."
            ) from None
        calls[name], errors[name] = call, float((output - wanted).norm() / wanted.norm().clamp(min=1e-30))
        # Written so that NaN is refused, too.
        if not errors[name] <= _TOLERANCES.get(name, float("inf")):
            raise NetworkError(
                f"Network '{bench.name}', {name}, has outputs that differ from those of the packed network in "
                f"float32 by {errors[name]:.2g} of their size, but {_TOLERANCES.get(name, 1):g} is allowed: the "
                "two do not compute the same, so their times mean nothing."
            )
    return calls, errors, missing


def _call(net: nn.Module, inputs: Any, compiled: bool) -> Call:
    args, kwargs = call_arguments(inputs)

    def run(*args: Any, **kwargs: Any) -> Any:
        return net(*args, **kwargs)

    if compiled:
        # torch.compile keeps what it has compiled by code object; methods that shared one would wait at each call
        # until it has found out that what it has for the others is not for them.
        own = FunctionType(run.__code__.replace(), globals(), closure=run.__closure__)
        run = torch.compile(own, fullgraph=True, dynamic=False)
    return lambda: run(*args, **kwargs)
