"""Text that a packed language model continues, told as it comes, and how fast it does."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.errors import DataError, RecipeError
from sqs_pyro.exporting.dense import DTYPES
from sqs_pyro.integrations.pretrained import transformers_package
from sqs_pyro.kernels.int8 import round_inputs
from sqs_pyro.networks.calling import device_of
from sqs_pyro.networks.modes import evaluating
from sqs_pyro.networks.tokens import longest_input
from sqs_pyro.runs.files import opened
from sqs_pyro.runs.kinds import kind_of


def generate_file(
    file: str | Path,
    prompt: str,
    *,
    tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool | None = None,
    compiled: bool = False,
    int8: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Continue a text by the language model of a packed file, through transformers' ``generate``.

    Args:
        file: packed file, a run's directory, or a packed Hugging Face directory.
        prompt: what is continued, or said to a model that chats.
        tokens: new ones, at most; fewer where the model says that it is done.
        temperature: divides the logits; 0 takes the likeliest token each time.
        seed: of the draws.
        chat: whether the prompt is put into the tokenizer's chat template; None: if it has one.
        compiled: each token by a step that is compiled: faster, behind a minute or two of compiling the first
            time, whose result is kept. On a GPU, and of networks with sliding windows, by ``torch.compile``, which
            traces the network in each process anew.
        int8: whether linear layers round their inputs to 8 bits, where weights are whole numbers
            (:func:`~sqs_pyro.kernels.int8.round_inputs`): faster, and by little another network.
        dtype: of what is computed, ``"float32"``, ``"bfloat16"`` or ``"float16"``. With bfloat16 CPUs that have a
            matrix unit read prompts several times as fast.
        device: where: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"`` or ``"auto"``.
        tell: called with each piece of text as it comes.

    Returns:
        ``file``, ``prompt``, ``text``, ``prompt_tokens``, ``tokens`` (new ones), ``first_token_seconds`` (prompt
        included), ``tokens_per_second`` (of those behind the first; None of fewer than two), ``compiled``,
        ``int8`` (how many layers round their inputs), ``dtype``.

    Raises:
        PackedFileError, NetworkError: the file is missing, not intact, or does not say how to build its network.
        DataError: it is no language model, or the prompt is empty or too long for it.
        RecipeError: a number is out of range, there is no such dtype, a chat is asked of a tokenizer without a
            template, or int8 of a network without layers for it.
    """
    if tokens < 1:
        raise RecipeError(f"--tokens is {tokens}, but must be at least 1.")
    if not 0 <= temperature < float("inf"):
        raise RecipeError(f"--temperature is {temperature:g}, but must be a number of at least 0.")
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype is {dtype!r}, but should be one of {', '.join(DTYPES)}.")
    source = opened(file, device=device)
    kind = kind_of(source.document)
    tokenizer = kind.tokenizer(source)
    ids = _prompt_tokens(tokenizer, prompt, chat)
    net = kind.network(source).to(DTYPES[dtype])
    longest = longest_input(net)
    if longest is not None and ids.shape[1] + tokens > longest:
        raise DataError(
            f"A prompt of {ids.shape[1]} tokens and {tokens} new ones are more than the {longest} that "
            f"{type(net).__name__} takes: shorten the prompt, or lower --tokens."
        )
    rounded = _rounded(net) if int8 else 0
    torch.manual_seed(seed)
    told = _streamer(tokenizer, tell)
    with evaluating(net), torch.inference_mode():
        said = _continued(net, ids, told, tokenizer, tokens, temperature, compiled)
    first, *later = told.times
    return {
        "file": str(source.path),
        "prompt": prompt,
        "text": tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True),
        "prompt_tokens": ids.shape[1],
        "tokens": said.shape[1] - ids.shape[1],
        "first_token_seconds": first - told.start,
        "tokens_per_second": len(later) / (later[-1] - first) if later else None,
        "compiled": compiled,
        "int8": rounded,
        "dtype": dtype,
    }


def _rounded(net: nn.Module) -> int:
    """Let layers round their inputs; return how many do."""
    rounded = round_inputs(net)
    if not rounded:
        raise RecipeError(
            "--int8 is given, but no layer has whole numbers of 2 to 4 bits, scales of outputs alone and a "
            "kernel for them here: compress with blockwise.grid: uniform, num_components of 3, 7 or 15 and no "
            "group_size, or leave it out."
        )
    return len(rounded)


def _prompt_tokens(tokenizer: Any, prompt: str, chat: bool | None) -> Tensor:
    """Return tokens ``[1, T]``."""
    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise RecipeError("--chat is given, but the tokenizer has no chat template: leave it out.")
    if not prompt.strip():
        raise DataError("The prompt is empty: give some text to continue.")
    if template and chat is not False:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        found = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    else:
        found = tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert isinstance(found, Tensor)
    return found


def _continued(
    net: nn.Module, ids: Tensor, told: Any, tokenizer: Any, tokens: int, temperature: float, compiled: bool
) -> Tensor:
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    if compiled:
        options |= _compilation(net, told)
    ends = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = ids.to(device_of(net))
    generate: Any = net.generate
    told.start = time.perf_counter()
    said: Tensor = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        pad_token_id=ends,
        streamer=told,
        **options,
    )
    return said


def _compilation(net: nn.Module, told: Any) -> dict[str, Any]:
    """Return what ``generate`` is given for compiled code, of whose tokens the streamer ``told`` hears, too."""
    from sqs_pyro.exporting.decoding import can_be_compiled, decode_compiled  # not before transformers is needed

    if can_be_compiled(net):
        # transformers hands a streamer to its own ways of decoding alone.
        return {"custom_generate": partial(decode_compiled, streamer=told)}
    compilation = transformers_package().CompileConfig(fullgraph=True, dynamic=False, mode="default")
    compilation._compile_all_devices = True  # else transformers compiles for GPUs only
    return {"cache_implementation": "static", "compile_config": compilation}


def _streamer(tokenizer: Any, tell: Callable[[str], None]) -> Any:
    """Return what transformers hands each token to: it tells their text, and notes when they came."""

    class Streamer(transformers_package().TextStreamer):  # type: ignore[misc]
        start = 0.0

        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []

        def put(self, value: Tensor) -> None:
            if not self.next_tokens_are_prompt:
                self.times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            tell(text)

    return Streamer()
