"""Tokens a second and memory of a packed language model, beside fp32, bf16 and bitsandbytes NF4, on the CPU.

SmolLM2-135M-Instruct, greedy generation with transformers' ``generate`` and its default cache. Speed: networks
take turns, ``--rounds`` times; the time of one token is that of ``--tokens`` new ones less that of one, over their
number less one; medians. Memory: a process for each network, resident set after loading and generating.

    python benchmarks/decode_speed.py --packed FILE [--packages DIRECTORY] [--threads 1]

``FILE`` is a packed file of this network, say of language_model.py. Needs an idle machine. Writes
``decode_speed.json`` beside this file.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from figures import write_figures
from packaged_weights import language_model
from torch import nn

import sqs_pyro
from sqs_pyro.integrations import save_pretrained

PROMPT = "The history of the compass begins with"


def checkpoints(packed: Path, packages: Path | None, directory: Path) -> None:
    """The dense and the packed network as checkpoints, each of which a process can load by itself."""
    net, tokenizer = language_model(packages)
    if hasattr(net.config, "quantization_config"):
        del net.config.quantization_config  # of the GGUF file, whose weights are dequantised
    plain = type(net)(net.config)  # transformers does not save a network that it has read from GGUF
    plain.load_state_dict(net.state_dict())
    plain.save_pretrained(directory / "dense")
    tokenizer.save_pretrained(directory / "dense")
    save_pretrained(sqs_pyro.load(packed, net), directory / "packed", tokenizer)


def network(name: str, directory: Path) -> nn.Module:
    """One of the networks that are compared."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kind, _, dtype = name.partition(", ")
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if kind == "NF4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=options["dtype"]
        )
    folder = directory / ("packed" if kind == "packed" else "dense")
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def generate(net: nn.Module, tokenizer: Any, tokens: int) -> tuple[float, str]:
    """Seconds and text of that many new tokens."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    start = time.perf_counter()
    with torch.inference_mode():
        out = net.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
    return time.perf_counter() - start, tokenizer.decode(out[0], skip_special_tokens=True)


def memory(name: str, directory: Path, threads: int, packages: Path | None) -> dict[str, float]:
    """In a process of its own, megabytes: after loading, and behind generation."""
    command = [sys.executable, __file__, "--memory-of", name, "--dir", str(directory), "--threads", str(threads)]
    command += [] if packages is None else ["--packages", str(packages)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def tell_memory(name: str, directory: Path) -> None:
    from transformers import AutoTokenizer

    before = resident()
    net = network(name, directory)
    loaded = resident()
    generate(net, AutoTokenizer.from_pretrained(directory / "dense"), 16)
    print(json.dumps({"libraries": before, "loaded": loaded - before, "generated": resident() - before}))


def resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


NETWORKS = ("dense, float32", "dense, bfloat16", "NF4, bfloat16", "packed, float32", "packed, bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--packed", type=Path)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="where checkpoints are written to; a temporary directory")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.packages is not None:
        sys.path.append(str(args.packages))  # has bitsandbytes
    if args.memory_of:
        tell_memory(args.memory_of, args.dir)
        return
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        directory = args.dir or Path(temporary)
        checkpoints(args.packed, args.packages, directory)
        tokenizer = AutoTokenizer.from_pretrained(directory / "dense")
        nets = {name: network(name, directory) for name in NETWORKS}
        seconds: dict[str, list[float]] = {name: [] for name in NETWORKS}
        texts = {name: generate(net, tokenizer, args.tokens)[1] for name, net in nets.items()}  # warm, too
        for _ in range(args.rounds):
            for name, net in nets.items():
                first, _ = generate(net, tokenizer, 1)
                whole, _ = generate(net, tokenizer, args.tokens)
                seconds[name].append((whole - first) / (args.tokens - 1))
        del nets
        rows = [
            {
                "network": name,
                "tokens_per_second": 1 / statistics.median(seconds[name]),
                "seconds_per_token": seconds[name],
                "megabytes": memory(name, directory, args.threads, args.packages),
                "text": texts[name],
            }
            for name in NETWORKS
        ]
    for row in rows:
        held = row["megabytes"]
        print(f"{row['network']:<18}{row['tokens_per_second']:7.1f} tokens/s, {held['loaded']:6.0f} MB loaded, "
              f"{held['generated']:6.0f} MB behind generation")  # fmt: skip
    document = {"network": "SmolLM2-135M-Instruct", "threads": args.threads, "tokens": args.tokens, "rows": rows}
    write_figures(Path(__file__).with_suffix(".json"), document)


if __name__ == "__main__":
    main()
