"""Decoding by a compiled step: what a language model does for one token, compiled once for a machine and kept.

``torch.compile`` keeps what it has compiled, too, but traces a network anew in every process, which takes longer
than a short answer. Here the step is an AOTInductor package without weights: it takes those of the network that is
in memory, so that it is small, and is loaded in a moment.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from sqs_pyro.compiling import compiled
from sqs_pyro.errors import NetworkError
from sqs_pyro.exporting.aoti import operators
from sqs_pyro.exporting.cached_attention import reading_what_is_seen
from sqs_pyro.exporting.trace import one_sentence
from sqs_pyro.kernels.native import has_native_kernel
from sqs_pyro.kernels.processor import processor_text
from sqs_pyro.networks.calling import device_of
from sqs_pyro.networks.tokens import cache_name
from sqs_pyro.packing.stored import StoredWeight

_STEP = 256  # caches are as long as a multiple of it by a power of two, so that few lengths are ever compiled
_OF_A_LAYER = ("keys", "values", "cumulative_length")


def decode_compiled(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **inputs: Any,
) -> Tensor:
    """Decode a text as transformers' ``generate`` does, each token by the network's compiled step.

    It is what ``net.generate(..., custom_generate=decode_compiled)`` calls: processors of logits and stopping
    criteria are those of ``generate``; a streamer, which it keeps to itself, is given beside it and by
    ``functools.partial(decode_compiled, streamer=...)``. The first call for a network's shapes compiles for a
    minute or two; what comes of it is kept beside the compiled kernels, for every file of these shapes.

    Returns:
        The prompt and what follows on it, int64 ``[1, T]``.

    Raises:
        NetworkError: the network or what is asked cannot be decoded so: it is not on the CPU, has a cache of
            another kind (sliding windows) or weights without compiled kernels; more than one text, padding, beams.
    """
    _check(model, input_ids, generation_config, inputs.get("attention_mask"))
    cache = static_cache(model, int(generation_config.max_length))
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.inference_mode():
        logits = _called(model, input_ids, cache, **only_last)
        # Before the first token, so that those behind it come as fast as they do; a single one needs no step.
        step = compiled_step(model, cache) if generation_config.max_length > input_ids.shape[1] + 1 else None
        while True:
            scores = logits_processor(input_ids, logits.float())
            if generation_config.do_sample:
                token = torch.multinomial(scores.softmax(-1), 1)
            else:
                token = scores.argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], 1)
            if streamer is not None:
                streamer.put(token.flatten())
            if step is None or bool(stopping_criteria(input_ids, scores).all()):
                break
            logits = step(token)
    if streamer is not None:
        streamer.end()
    return input_ids


def can_be_compiled(model: nn.Module) -> bool:
    """Return whether a network's cache and device are of the kind that :func:`decode_compiled` takes."""
    kinds = {type(layer) for layer in _cache(model, _STEP).layers}
    return kinds == {transformers.cache_utils.StaticLayer} and device_of(model).type == "cpu"


def static_cache(model: nn.Module, length: int) -> Any:
    """Return an empty cache for a text of ``length`` tokens or a few more."""
    size = _STEP
    while size < length:
        size *= 2
    return _cache(model, size)


def compiled_step(model: nn.Module, cache: Any) -> Callable[[Tensor], Tensor]:
    """Return the function from a token, int64 ``[1, 1]``, to the logits behind it, ``[1, V]``; it fills the cache.

    Args:
        model: a causal language model of transformers in evaluation mode, on the CPU.
        cache: that has seen the tokens before, of :func:`static_cache`.

    Raises:
        NetworkError: the network cannot be traced or compiled, or has weights without compiled kernels.
    """
    step = _Step(model, cache)
    path = compiled("decoding", [], _key(step), lambda file: _compile(step, file), suffix=".pt2")
    run = torch._inductor.aoti_load_package(str(path))
    held = _tensors(step)
    # The network's own tensors, not copies of them.
    weights = {name: held[name].detach() for name in run.get_constant_fqns()}
    run.load_constants(weights, check_full_update=True, user_managed=True)

    def call(token: Tensor) -> Tensor:
        logits: Tensor = run(token, *step.seen)
        return logits

    call.keeps = held  # type: ignore[attr-defined]  # compiled code has addresses only
    return call


class _Step(nn.Module):
    """One token ``[1, 1]`` through a network and the tensors of its cache, which it writes to: logits ``[1, V]``.

    Attributes:
        seen: the tensors of the cache.
    """

    def __init__(self, network: nn.Module, cache: Any) -> None:
        super().__init__()
        self.network, self.cache = network, cache
        self.seen = [getattr(layer, part) for layer in cache.layers for part in _OF_A_LAYER]

    def forward(self, token: Tensor, *seen: Tensor) -> Tensor:
        # Inputs: compiled code does not write to tensors that a network has by itself.
        self.let_write_to(seen)
        return _called(self.network, token, self.cache)

    def let_write_to(self, seen: Sequence[Tensor]) -> None:
        """Put tensors in the place of the cache's own; a trace has others."""
        each = iter(seen)
        for layer in self.cache.layers:
            for part in _OF_A_LAYER:
                setattr(layer, part, next(each))


def _compile(step: _Step, file: Path) -> None:
    with torch.no_grad(), one_sentence("compiled"):
        try:
            with reading_what_is_seen(step.network):
                program = torch.export.export(step, (torch.zeros(1, 1, dtype=torch.int64), *step.seen))
        finally:
            step.let_write_to(step.seen)
    python = {op for ops in operators(program, step.network).values() for op in ops if not has_native_kernel(op)}
    if python:
        raise NetworkError(
            f"The network's weights have no compiled {', '.join(sorted(python))} here, which a compiled step "
            "calls: decode without it, or see what `sqs doctor` says of compilers."
        )
    with one_sentence("compiled"):
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(file),
            inductor_configs={"aot_inductor.package_constants_in_so": False},
        )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    parameters, buffers = (
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    )
    return {**dict(parameters), **dict(buffers)}


def _key(step: _Step) -> list[str]:
    """Return everything that the compiled step depends on, but the values of weights."""
    weights = {path: module for path, module in step.named_modules() if isinstance(module, StoredWeight)}
    # What operators are given beside tensors is in the graph.
    arguments = {
        path: [str(each) for each in getattr(weight, "args", ()) if not isinstance(each, Tensor)]
        for path, weight in weights.items()
    }
    tensors = _tensors(step) | {str(i): value for i, value in enumerate(step.seen)}
    shapes = {name: [str(value.dtype), *value.shape, *value.stride()] for name, value in tensors.items()}
    network: Any = step.network
    # Where the network was read from is no part of it.
    config = {key: value for key, value in network.config.to_dict().items() if key != "_name_or_path"}
    said = json.dumps([config, arguments, shapes, repr(network)], default=str, sort_keys=True)
    return [
        hashlib.sha256(said.encode()).hexdigest(),
        str(torch.__version__),
        transformers.__version__,
        processor_text(),
        torch.backends.cpu.get_cpu_capability(),
        str(torch.get_num_threads()),
        str(has_native_kernel("cached_attention")),
    ]


def _check(model: nn.Module, input_ids: Tensor, generation_config: Any, mask: Tensor | None) -> None:
    repair = "leave custom_generate out, which decodes it as ever."
    if device_of(model).type != "cpu":
        raise NetworkError(f"A compiled step is for CPUs, but the network is on {device_of(model)}: {repair}")
    if not can_be_compiled(model):
        raise NetworkError(
            f"{type(model).__name__} has sliding windows or another cache than one of fixed size: {repair}"
        )
    if generation_config.num_beams != 1 or generation_config.return_dict_in_generate:
        raise NetworkError(f"A compiled step gives one sequence of tokens, no beams or scores: {repair}")
    if len(input_ids) != 1 or (mask is not None and not bool(mask.all())):
        raise NetworkError(f"A compiled step decodes one text without padding, but got {len(input_ids)}: {repair}")


def _cache(model: Any, size: int) -> Any:
    return transformers.StaticCache(config=model.config, max_cache_len=size)


def _called(model: nn.Module, tokens: Tensor, cache: Any, **options: Any) -> Tensor:
    """Return the logits behind tokens, ``[1, V]``, which the cache has then seen."""
    logits: Tensor = model(input_ids=tokens, use_cache=True, **{str(cache_name(model)): cache}, **options).logits
    return logits[:, -1]
