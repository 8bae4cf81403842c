"""Latency, bytes and memory of exports beside float32 in the same runtime.

    python benchmarks/exported.py [--networks resnet20 mobilenet minilm llama]
        [--runtimes onnx openvino executorch] [--rounds 15] [--packages DIRECTORY] [--llama-cpp PYTHON]
        [--text FILE] [--dir DIRECTORY] [--out FILE]

Weights are rounded, not trained: to 16 whole numbers times a scale of each output (what ``grid: uniform`` gives
runtimes to multiply with), or to 16 quantiles of the layer (free codewords). Latency depends on neither. ``llama``
is the first blocks of SmolLM2-135M with its head; all of it runs in llama.cpp, where ``PYTHON`` has
llama-cpp-python. ``DIRECTORY`` of ``--dir`` keeps exports: those that are there are not written anew.

One thread. Variants of one network take turns in one process, call by call, with caches warm; a single token also
behind a walk through more memory than they hold, cold. Times are those of the processor, so that other work on the
machine does not count; ``times_as_fast`` is the median over turns of float32's over the variant's, with its 95 %
interval (order statistics). Differences are the largest of an output relative to the largest output: of what we
export to the packed network, of what ONNX Runtime has quantized to the float32 network. Memory is what a process
of its own has more behind a call than before it read the network. Writes ``exported.json`` beside this file, or
``--out``.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import write_figures
from generation import printed, rounded, write
from packaged_weights import language_model, sentence_embedding
from safetensors.torch import load_file
from scipy.stats import quantile_test
from torch import Tensor, nn

import sqs_pyro.models.catalogue  # noqa: F401  # registers networks
from sqs_pyro import integrations
from sqs_pyro.bench.report import cold_bytes, spread
from sqs_pyro.data import DataRecipe, load_data
from sqs_pyro.evaluation.latency import interleaved
from sqs_pyro.exporting import export_executorch, export_onnx
from sqs_pyro.exporting.openvino import EXACT, translate
from sqs_pyro.exporting.trace import input_names, input_tensors, named_arrays, outputs
from sqs_pyro.kernels import packed_network
from sqs_pyro.kernels.processor import processor
from sqs_pyro.networks.registry import build_network
from sqs_pyro.packing import CodedTensor
from sqs_pyro.runs.export import export_file

FLOAT = "float32"
WHOLE = "ours, whole numbers"
FREE = "ours, free codewords"
BLOCKS = 6  # of SmolLM2, in `llama`
TOKENS = 256  # whose logits of llama.cpp are compared
TESTED = 1000  # images
OPENVINO = {**EXACT, "INFERENCE_NUM_THREADS": 1}
RUNTIMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "executorch": "ExecuTorch"}
SUFFIXES = {"onnx": ".onnx", "openvino": "", "executorch": ".pte"}

MEMORY = """
import json, os, sys
import numpy as np

def held():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

runtime, path, given, options = sys.argv[1:]
inputs = dict(np.load(given))
if runtime == "onnx":
    import onnxruntime
    before = held()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    session.run(None, inputs)
elif runtime == "executorch":
    import torch
    import executorch.kernels.quantized
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime
    _unsafe_reset_threadpool(1)
    before = held()
    network = Runtime.get().load_program(path).load_method("forward")
    network.execute([torch.from_numpy(value) for value in inputs.values()])
else:
    import openvino
    core = openvino.Core()
    before = held()
    network = core.compile_model(path + "/network.xml", "CPU", json.loads(options))
    network(inputs)
print(json.dumps(held() - before))
"""

LLAMA_CPP = """
import ctypes, json, os, sys, time
import llama_cpp
import numpy as np

directory, mode, more = sys.argv[1:]
ids = np.load(directory + "/tokens.npy").tolist()
READ, DECODED = 64, 8

def held():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def opened(name, **options):
    sizes = {"n_ctx": len(ids), "n_batch": len(ids), "n_threads": 1, "n_threads_batch": 1}
    return llama_cpp.Llama(f"{directory}/{name}.gguf", verbose=False, **sizes, **options)

found = {}
if mode == "decode":
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize, parameters.nthread = llama_cpp.LLAMA_FTYPE_ALL_F32, True, 1
    paths = (f"{directory}/{name}.gguf".encode() for name in ("whole", "float32"))
    assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(parameters)) == 0
elif mode == "logits":
    before = held()
    llm = opened(more)
    llm.eval(ids[:READ])
    found = {"memory_bytes": held() - before}
    llm = opened(more, logits_all=True)
    llm.eval(ids)
    np.save(f"{directory}/{more}.npy", llm.scores[: len(ids)])
else:
    networks = {name: opened(name) for name in json.loads(more)}
    found = {name: {"64 tokens": [], "1 token": []} for name in networks}
    for turn in range(-1, int(mode)):
        for name, llm in networks.items():
            llm.reset()
            start = time.process_time()
            llm.eval(ids[:READ])
            middle = time.process_time()
            for token in ids[READ : READ + DECODED]:
                llm.eval([token])
            if turn >= 0:
                found[name]["64 tokens"].append(middle - start)
                found[name]["1 token"].append((time.process_time() - middle) / DECODED)
print(json.dumps(found))
"""


@dataclass(frozen=True, eq=False)
class Case:
    """A network and what it is called with.

    Attributes:
        net: in float32.
        example: what it is traced with, two rows or more.
        inputs: what is timed, one row, by what it is called in the table.
        test: images and their classes, on which accuracy is measured.
    """

    net: nn.Module
    example: Any
    inputs: Mapping[str, Any]
    test: tuple[Tensor, Tensor] | None = None


# ---- networks ----


def resnet20(_: Path | None) -> Case:
    """Trained on Fashion-MNIST, with training images as the example, whose ranges integers have."""
    net = build_network("resnet20", in_channels=1).eval()
    net.load_state_dict(load_file(Path("recipes", "weights", "fashion_mnist_resnet20.safetensors")))
    data = load_data(DataRecipe(name="fashion_mnist", batch_size=64))
    images, classes = next(iter(data.test))
    x = next(iter(data.train))[0]
    return Case(net, x, {"an image": x[:1]}, (images[:TESTED], classes[:TESTED]))


def mobilenet(_: Path | None) -> Case:
    """Weights and images at random."""
    torch.manual_seed(0)
    net, x = build_network("torchvision/mobilenet_v3_small").eval(), torch.randn(2, 3, 224, 224)
    return Case(net, x, {"an image": x[:1]})


def text(net: nn.Module, *lengths: int) -> Case:
    ids = torch.randint(net.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    some = {length: {name: value[:1, :length] for name, value in both.items()} for length in lengths}
    return Case(net, both, {f"{n} token{'s' * (n > 1)}": inputs for n, inputs in some.items()})


def first_blocks(packages: Path | None) -> Case:
    net, _ = language_model(packages)
    net.model.layers = net.model.layers[:BLOCKS]
    net.config.num_hidden_layers = BLOCKS
    return text(net, 1, 64)


NETWORKS: dict[str, Callable[[Path | None], Case]] = {
    "resnet20": resnet20,
    "mobilenet": mobilenet,
    "minilm": lambda packages: text(sentence_embedding(packages)[0], 64),
    "llama": first_blocks,
}


def packed(net: nn.Module, code: Callable[[Tensor], CodedTensor] | None) -> nn.Module:
    """The network with its matrices and convolutions coded; with None as it is."""
    weights = {name: value.detach() for name, value in net.named_parameters() if value.dim() > 1 and code}
    return packed_network(net, {name: code(value) for name, value in weights.items()} if code else {})


def free(weight: Tensor) -> CodedTensor:
    """Sixteen quantiles of the layer, none of them zero."""
    places = (torch.arange(16) + 0.5) / 16
    values = torch.from_numpy(np.quantile(weight.numpy(), places.numpy())).half().float()
    values = torch.where(values == 0, 1e-4, values).half().float().unique()
    between = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(weight, between).to(torch.uint8)
    return CodedTensor(codes, torch.ones_like(codes, dtype=torch.bool), values[None])


# ---- ONNX Runtime and OpenVINO ----


def written(case: Case, runtime: str, directory: Path) -> Iterator[tuple[str, Path, nn.Module]]:
    """Each variant of a runtime: name, place, and the network whose outputs it should have."""
    convolves = any(isinstance(module, nn.Conv2d) for module in case.net.modules())
    variants = {FLOAT: None, WHOLE: rounded, FREE: free}
    if runtime == "executorch":  # where free codewords are decoded
        del variants[FREE]
    if runtime == "onnx" and convolves:
        variants[f"{WHOLE}, onnx-qdq"] = variants[f"{WHOLE}, int8 activations"] = rounded
    for name, code in variants.items():
        place = directory / f"{name.replace(', ', '_').replace(' ', '-')}{SUFFIXES[runtime]}"
        net = packed(case.net, code)
        if not place.exists() and runtime == "onnx":
            examples = [case.example] if name.endswith("activations") else None
            export_onnx(net, case.example, place, quantized=name.endswith("qdq"), int8_examples=examples)
        elif not place.exists() and runtime == "executorch":
            export_executorch(net, case.example, place)
        elif not place.exists():  # as export_openvino does, with the model that there is
            translate(directory.with_name("onnx") / f"{place.name}.onnx", place)
        yield name, place, net
    if runtime == "onnx":
        for name, place in quantized(directory / f"{FLOAT}.onnx", directory, convolves):
            yield name, place, case.net


def quantized(source: Path, directory: Path, convolves: bool) -> Iterator[tuple[str, Path]]:
    """What ONNX Runtime's own quantizers make of a network in float32."""
    tools: Any = importlib.import_module("onnxruntime.quantization")
    place = directory / "int8.onnx"
    if not place.exists():
        # Its convolutions of integers take unsigned weights.
        kind = tools.QuantType.QUInt8 if convolves else tools.QuantType.QInt8
        tools.quantize_dynamic(source, place, weight_type=kind)
    yield "quantize_dynamic, int8", place
    if convolves:  # whose products are few
        return
    place = directory / "nbits.onnx"
    if not place.exists():
        blocks: Any = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
        onnx: Any = importlib.import_module("onnx")
        quantizer = blocks.MatMulNBitsQuantizer(onnx.load(source), bits=4, block_size=32, is_symmetric=True)
        quantizer.process()
        quantizer.model.save_model_to_file(str(place))
    yield "MatMulNBitsQuantizer, 4 bits", place


def call(runtime: str, place: Path, inputs: Any) -> Callable[[], Any]:
    """A call of what is exported, on one thread."""
    if runtime == "onnx":
        ort: Any = importlib.import_module("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(str(place), options, providers=["CPUExecutionProvider"])
        given = named_arrays(inputs, (value.name for value in session.get_inputs()))
        return lambda: session.run(None, given)
    if runtime == "executorch":
        importlib.import_module("executorch.kernels.quantized")
        importlib.import_module("executorch.extension.pybindings.portable_lib")._unsafe_reset_threadpool(1)
        program = importlib.import_module("executorch.runtime").Runtime.get().load_program(place)
        method, tensors = program.load_method("forward"), [*map(Tensor.contiguous, input_tensors(inputs))]
        return lambda: [value.numpy() for value in method.execute(tensors)]
    openvino: Any = importlib.import_module("openvino")
    network = openvino.Core().compile_model(place / "network.xml", "CPU", OPENVINO)
    given = named_arrays(inputs, (name for value in network.inputs for name in value.names))
    return lambda: list(network(given).values())


def accuracies(case: Case, runtime: str, place: Path, net: nn.Module) -> dict[str, float]:
    """Accuracy of what is exported, and of the packed network, where there are test images."""
    if case.test is None or runtime == "executorch":  # which takes no more rows than the example
        return {}
    x, classes = case.test
    (logits,) = call(runtime, place, x)()
    both = {"accuracy": torch.from_numpy(np.asarray(logits)), "accuracy_in_torch": outputs(net, x)[0]}
    return {name: float((found.argmax(1) == classes).double().mean()) for name, found in both.items()}


def memory(runtime: str, place: Path, inputs: Any) -> int:
    """Bytes that a process has more with the network than without."""
    with tempfile.TemporaryDirectory() as directory:
        given = Path(directory, "inputs.npz")
        np.savez(given, **named_arrays(inputs, input_names(inputs)))
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, runtime, str(place), str(given), json.dumps(OPENVINO)],
            capture_output=True,
            text=True,
            check=True,
        )
    return int(json.loads(done.stdout))


def measured(name: str, case: Case, runtime: str, directory: Path, rounds: int) -> Iterator[dict[str, Any]]:
    directory.mkdir(parents=True, exist_ok=True)
    variants = {variant: (place, net) for variant, place, net in written(case, runtime, directory)}
    most = [*case.inputs.values()][-1]
    held = {variant: memory(runtime, place, most) for variant, (place, _) in variants.items()}
    walk = torch.ones(cold_bytes() // 4).sum  # ones, because untouched zeros would all be one page
    for said, inputs in case.inputs.items():
        calls = {variant: call(runtime, place, inputs) for variant, (place, _) in variants.items()}
        for cold in (False, True) if said == "1 token" else (False,):
            before = (lambda _: walk()) if cold else (lambda turn: turn())
            taken = interleaved(calls, rounds, before, clock=time.process_time)
            for variant, (place, net) in variants.items():
                found = [torch.from_numpy(np.asarray(value)) for value in calls[variant]()]
                yield {
                    "runtime": RUNTIMES[runtime],
                    "network": name,
                    "input": said,
                    "cold": cold,
                    "variant": variant,
                    "file_bytes": size(place),
                    "memory_bytes": held[variant],
                    "relative_difference": difference(found, outputs(net, inputs)),
                    **accuracies(case, runtime, place, net),
                    **times(taken[FLOAT], taken[variant]),
                }


# ---- llama.cpp ----


def llama_cpp(python: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """SmolLM2 as we export it, and the same numbers in float32, which llama.cpp itself makes of the file."""
    directory = args.dir / "smollm2"
    if not (directory / "packed").exists():
        write(args.packages, directory / "packed")
    if not (directory / "whole.gguf").exists():
        export_file(directory / "packed", "gguf", directory / "whole.gguf")
    net = integrations.from_pretrained(directory / "packed")
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(directory / "packed")
    ids = tokenizer(args.text.read_text(encoding="utf-8")[:10_000]).input_ids[:TOKENS]
    np.save(directory / "tokens.npy", ids)
    if not (directory / "float32.gguf").exists():
        printed(python, LLAMA_CPP, 1, directory, "decode", "")
    variants = {"float32": FLOAT, "whole": WHOLE}
    taken = printed(python, LLAMA_CPP, 1, directory, args.rounds, json.dumps([*variants]))
    expected = outputs(net, torch.tensor([ids]))[0][0]
    for name, variant in variants.items():
        held = printed(python, LLAMA_CPP, 1, directory, "logits", name)
        logits = torch.from_numpy(np.load(directory / f"{name}.npy"))
        for said in taken[name]:
            yield {
                "runtime": "llama.cpp",
                "network": "smollm2",
                "input": said,
                "cold": False,
                "variant": variant,
                "file_bytes": size(directory / f"{name}.gguf"),
                **held,
                "relative_difference": difference([logits], (expected,)),
                "same_next_token": float((logits.argmax(1) == expected.argmax(1)).double().mean()),
                "perplexity": perplexity(logits, ids),
                "perplexity_in_torch": perplexity(expected, ids),
                **times(taken["float32"][said], taken[name][said]),
            }


def perplexity(logits: Tensor, ids: list[int]) -> float:
    return float(nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:])).exp())


# ---- figures ----


def size(place: Path) -> int:
    return sum(path.stat().st_size for path in ([place] if place.is_file() else place.iterdir()) if path.is_file())


def difference(found: list[Tensor], expected: tuple[Tensor, ...]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


def times(float32: list[float], own: list[float]) -> dict[str, Any]:
    ratios = [theirs / ours for theirs, ours in zip(float32, own, strict=True)]
    interval = quantile_test(ratios, p=0.5).confidence_interval(0.95)
    return {**spread(own), "times_as_fast": float(np.median(ratios)), "interval": [*map(float, interval)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=[*NETWORKS])
    parser.add_argument("--runtimes", nargs="*", default=[*RUNTIMES])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--llama-cpp", metavar="PYTHON")
    parser.add_argument("--text", type=Path, default=Path("data", "foreign.txt"))
    parser.add_argument("--dir", type=Path, default=Path("runs", "exported"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in args.networks:
        case = NETWORKS[name](args.packages)
        for runtime in args.runtimes:
            for row in measured(name, case, runtime, args.dir / name / runtime, args.rounds):
                rows.append(row)
                print(row, flush=True)
    for row in llama_cpp(args.llama_cpp, args) if args.llama_cpp else ():
        rows.append(row)
        print(row, flush=True)
    write_figures(args.out, {"processor": processor()[0], "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
