"""Accuracy over bytes of ISO/IEC 15938-17 (NNC) on ResNet-20, with the fine-tuning that our own files have had.

For every seed and share of zeros the fp32 network is pruned by magnitude (the cubic schedule over the first half
of the steps, then masks that stay) and fine-tuned with the budget of ``recipes/fashion_mnist_adaptive.yaml``:
4 epochs in minibatches of 128, distilled, SGD, augmentation, learning rate's schedule and precision as there.
nncodec then codes each of them, and the fp32 network as it is, at every step width ``--qp`` and weight of the rate
``--lambda-scale`` with trellis quantization and folded batch norms. Before folding, their statistics are estimated
anew from the network with decoded weights, as ours are. What is evaluated is the decoded stream, and its bytes are
the whole stream's, in which tensors have names of one character.

Shares of zeros, step widths and lambdas are chosen by validation accuracy: with the seeds' means in the order of
bytes, a setting counts if all smaller ones have less of it. Between two of these, test accuracy and the logarithm
of bytes are interpolated. Files of ours are compared with the fewest bytes at which NNC's mean has their mean
accuracy, and, paired by seed, with each seed's own curve. ``--ours`` are figures that ``sqs compare`` has written.

    python benchmarks/nnc_bar.py --nncodec NNC/bin/python --ours benchmarks/fashion_mnist_laws_distilled.json

Networks and points that are done are kept in ``--states`` and not made again. nncodec wants an older NumPy than
this project, so it runs in an environment of its own: ``python -m venv NNC && NNC/bin/pip install nncodec``.
Writes ``nnc_bar.json`` beside this file.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

EPOCHS, WARM_UP = 4, 0.02
PRUNING_START, PRUNING_END, RENEW_EVERY = 0.05, 0.5, 20  # shares of the steps; steps
STATISTICS = 60  # minibatches
WEIGHTS = "recipes/weights/fashion_mnist_resnet20.safetensors"

Arrays = dict[str, np.ndarray]


def serve_streams() -> None:
    """Code the networks that lines of standard input name, in nncodec's own environment; answer with bytes."""
    from nncodec import nnc

    answers, sys.stdout = sys.stdout, sys.stderr  # the package prints
    for line in sys.stdin:
        path, types, settings = json.loads(line)
        with np.load(path) as file:
            arrays = {name: file[name] for name in file}
        about = {"parameter_type": types, "block_identifier": {name: name.split(".")[0] for name in types}}
        stream = nnc.compress(
            arrays,
            bitstream_path=None,
            return_bitstream=True,
            use_dq=True,
            bnf=True,
            cabac_unary_length_minus1=0,  # a per cent smaller here than with the default of 10
            block_id_and_param_type=about,
            **settings,
        )
        np.savez(path, **nnc.decompress(stream))
        print(len(stream), file=answers, flush=True)


class Codec:
    """nncodec in a process of its own, which starts with the first network."""

    def __init__(self, python: str) -> None:
        self.python = python

    @cached_property
    def process(self) -> "subprocess.Popen[str]":
        """Which reads and answers lines."""
        command = [self.python, __file__, "--serve"]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, net: Any, settings: Mapping[str, Any]) -> tuple[int, Any]:
        """Return the bytes of a network's stream, and the network that is read from it."""
        assert self.process.stdin and self.process.stdout
        arrays, types = blocks(net)
        with tempfile.TemporaryDirectory() as directory:
            path = f"{directory}/network.npz"
            np.savez(path, **arrays)
            self.process.stdin.write(json.dumps([path, types, settings]) + "\n")
            self.process.stdin.flush()
            size = int(self.process.stdout.readline())
            with np.load(path) as decoded:
                return size, with_decoded(net, dict(decoded))


def layers(net: Any) -> list[tuple[str, Any, Any]]:
    """Return a character, a layer with weights and its batch norm, or None, for each layer."""
    from torch import nn

    modules = [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d)]
    pairs = [(a, b if isinstance(b, nn.BatchNorm2d) else None) for a, b in pairwise([*modules, None])]
    found = [pair for pair in pairs if not isinstance(pair[0], nn.BatchNorm2d)]
    return [(chr(ord("a") + i), *each) for i, each in enumerate(found)]


def blocks(net: Any) -> tuple[Arrays, dict[str, str]]:
    """Return a network as NNC's blocks: arrays by name, and what each of them is."""
    arrays, types = {}, {}
    for name, layer, norm in layers(net):
        parts = {"": ("weight", layer.weight)}
        if layer.bias is not None:
            parts[".bias"] = ("bias", layer.bias)
        if norm is not None:
            parts |= {".g": ("bn.gamma", norm.weight), ".b": ("bn.beta", norm.bias)}
            parts |= {".m": ("bn.mean", norm.running_mean), ".v": ("bn.var", norm.running_var)}
        for end, (kind, tensor) in parts.items():
            arrays[name + end], types[name + end] = tensor.detach().contiguous().numpy(), kind
    return arrays, types


def with_decoded(net: Any, arrays: Arrays) -> Any:
    """Return a copy of a network with the weights, scales and shifts of a stream, and norms without statistics."""
    import copy

    import torch

    net = copy.deepcopy(net)
    with torch.no_grad():
        for name, layer, norm in layers(net):
            layer.weight.copy_(torch.from_numpy(arrays[name]))
            if norm is None:
                layer.bias.copy_(torch.from_numpy(arrays[f"{name}.bias"]))
                continue
            norm.weight.copy_(torch.from_numpy(arrays[f"{name}_scaling"]) * (1 + norm.eps) ** 0.5)
            norm.bias.copy_(torch.from_numpy(arrays[f"{name}.bias"]))
            norm.running_mean.zero_()
            norm.running_var.fill_(1)
    return net


def fused(net: Any) -> Any:
    """Return a copy of a network in evaluation mode whose norms are within its convolutions, which runs faster."""
    import copy

    import torch

    net = copy.deepcopy(net).eval()
    with torch.no_grad():
        for _, layer, norm in layers(net):
            if norm is not None:
                scale = norm.weight / (norm.running_var + norm.eps).sqrt()
                layer.weight.mul_(scale[:, None, None, None])
                layer.bias = torch.nn.Parameter(norm.bias - norm.running_mean * scale)
                norm.forward = lambda x: x
    return net


def data_of(seed: int) -> Any:
    """Return the recipe's minibatches in a seed's order."""
    from sqs_pyro.data import DataRecipe, load_data

    return load_data(DataRecipe(name="fashion_mnist", batch_size=128, validation=5000), seed)


def fp32_network() -> Any:
    """Return the network that all begin with."""
    import torch

    from sqs_pyro.networks.registry import build_network
    from sqs_pyro.networks.state import load_weights

    net = build_network("resnet20", in_channels=1)
    load_weights(net, WEIGHTS)
    return net.to(memory_format=torch.channels_last).eval()


def zeros_at(progress: float, zeros: float) -> float:
    """Return the share of zeros at a share of the steps (Zhu & Gupta 2017, eq. 1)."""
    done = (progress - PRUNING_START) / (PRUNING_END - PRUNING_START)
    return zeros * (1 - (1 - min(max(done, 0.0), 1.0)) ** 3)


def rate_at(step: int, steps: int) -> float:
    """Return the share of the highest learning rate: linear warm-up, then half a cosine to 0."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def prune(weights: Sequence[Any], zeros: float) -> list[Any]:
    """Set the smallest of all weights to zero, in place, and return the masks of the others."""
    import torch

    with torch.no_grad():
        sizes = torch.cat([weight.abs().flatten() for weight in weights])
        threshold = sizes.kthvalue(max(1, round(zeros * len(sizes)))).values if zeros else -1.0
        masks = [weight.abs() > threshold for weight in weights]
        for weight, mask in zip(weights, masks, strict=True):
            weight.mul_(mask)
    return masks


def fine_tuned(seed: int, zeros: float, rate: float, kept: Path) -> Any:
    """Return the network pruned and fine-tuned; its state is kept after every epoch."""
    import torch

    from sqs_pyro.models.distillation import DistillationLikelihood, DistilledLoader

    net, data = fp32_network(), data_of(seed)
    weights = [p for p in net.parameters() if p.dim() > 1]
    groups = [
        {"params": weights, "weight_decay": 5e-4},
        {"params": [p for p in net.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, fused=True)
    likelihood = DistillationLikelihood(weight=0.7, temperature=3.0)
    loader = DistilledLoader(data.train, fused(fp32_network()), 3.0, torch.bfloat16)
    steps, step = EPOCHS * len(loader), 0
    path = kept / f"pruned_{zeros:g}_rate_{rate:g}_seed_{seed}.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    masks = [weight != 0 for weight in weights]
    while step < steps:
        loader.epoch = step // len(loader)
        for x, opinion in loader:
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_at(step, steps)
            if step % RENEW_EVERY == 0 and step <= PRUNING_END * steps + RENEW_EVERY:
                masks = prune(weights, zeros_at(step / steps, zeros))
            net.train()
            with torch.autocast("cpu", torch.bfloat16):
                loss = -likelihood(net(x)).log_prob(opinion).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for weight, mask in zip(weights, masks, strict=True):
                    weight.mul_(mask)
            step += 1
            if step % 50 == 0:
                print(f"{path.stem}: step {step} of {steps}, loss {float(loss.detach()):.4f}", flush=True)
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, path)
    return net.eval()


def coded(net: Any, codec: Codec, settings: Mapping[str, Any], train: Any) -> tuple[int, Any]:
    """Return the bytes of a network's stream and what it decodes to; norms fit the decoded weights."""
    import copy

    import torch

    from sqs_pyro.shipping.batch_norm import reestimate_batch_norm

    _, decoded = codec(net, settings)
    fitted = copy.deepcopy(net)
    with torch.no_grad():
        for (_, layer, _), (_, read, _) in zip(layers(fitted), layers(decoded), strict=True):
            layer.weight.copy_(read.weight)
        train.epoch = EPOCHS
        with torch.autocast("cpu", torch.bfloat16):
            reestimate_batch_norm(fitted, train, STATISTICS)
        # Quantized from what was trained: values of a trellis are none of its fixed points.
        for (_, layer, _), (_, trained, _) in zip(layers(fitted), layers(net), strict=True):
            layer.weight.copy_(trained.weight)
    return codec(fitted, settings)


def accuracy(net: Any, loader: Any) -> float:
    """Return the share of examples whose class is right, in float32."""
    import torch

    net, right = fused(net), 0
    with torch.inference_mode():
        for x, y in loader:
            right += int((net(x).argmax(-1) == y).sum())
    return right / len(loader.dataset)


def points(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return bytes and accuracies of every network at every setting; what is kept is not measured again."""
    path = args.states / "points.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    codec = Codec(args.nncodec)
    # Without fine-tuning seeds differ by the images of the norms' statistics alone.
    networks = [(0.0, 0.0, 0), *product(args.zeros, args.learning_rate, args.seeds)]
    wanted = []
    for zeros, rate, seed in networks:
        net = None
        for qp, scale in product(args.qp if zeros else args.fp32_qp, args.lambda_scale):
            row = {"zeros": zeros, "learning_rate": rate, "seed": seed, "qp": qp, "lambda_scale": scale}
            row["nonweight_qp"] = args.nonweight_qp
            found = next((point for point in done if row.items() <= point.items()), None)
            if found is None:
                net = net or (fine_tuned(seed, zeros, rate, args.states) if zeros else fp32_network())
                data = data_of(seed)
                settings = {name: row[name] for name in ("qp", "lambda_scale", "nonweight_qp")}
                size, decoded = coded(net, codec, settings, data.train)
                found = row | {"bytes": size, "nonzeros": nonzero_rate(decoded)}
                found |= {"validation": accuracy(decoded, data.validation), "test": accuracy(decoded, data.test)}
                with path.open("a") as file:
                    file.write(json.dumps(found) + "\n")
                print(found, flush=True)
            wanted.append(found)
    return wanted


def nonzero_rate(net: Any) -> float:
    """Return the share of weights that are not zero."""
    weights = [layer.weight for _, layer, _ in layers(net)]
    return sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)


def envelope(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the settings with more validation accuracy than all smaller ones, by bytes; seeds' means."""
    of = ("zeros", "learning_rate", "qp", "lambda_scale")
    settings = {tuple(row[name] for name in of) for row in rows}
    table = []
    for setting in settings:
        same = sorted((r for r in rows if tuple(r[name] for name in of) == setting), key=lambda row: row["seed"])
        by_seed = {
            name: [row[name] for row in same] for name in ("seed", "bytes", "validation", "test", "nonzeros")
        }
        means = {name: float(np.mean(by_seed[name])) for name in ("bytes", "validation", "test", "nonzeros")}
        table.append(dict(zip(of, setting, strict=True)) | means | {"by_seed": by_seed})
    kept: list[dict[str, Any]] = []
    for point in sorted(table, key=lambda point: point["bytes"]):
        if not kept or point["validation"] > kept[-1]["validation"]:
            kept.append(point)
    return kept


@dataclass(frozen=True)
class Curve:
    """Accuracy over bytes, which rise; in between it is linear in their logarithm."""

    sizes: Sequence[float]
    accuracies: Sequence[float]

    def bytes_at(self, target: float) -> float | None:
        """Return the fewest bytes with an accuracy; None if it never is reached, or already at the first."""
        for i, (low, high) in enumerate(pairwise(self.accuracies)):
            if low < target <= high:
                share = (target - low) / (high - low)
                return self.sizes[i] ** (1 - share) * self.sizes[i + 1] ** share
        return None

    def accuracy_at(self, size: float) -> float | None:
        """Return the accuracy at a number of bytes; None outside of the curve."""
        if not self.sizes[0] <= size <= self.sizes[-1]:
            return None
        return float(np.interp(math.log(size), np.log(self.sizes), self.accuracies))


def interval(values: Sequence[float | None]) -> list[float] | None:
    """Return the 95 % interval (Student's t) of a mean over seeds; None where one has no value, or is alone."""
    from scipy import stats

    known = [value for value in values if value is not None]
    if len(known) < max(2, len(values)):
        return None
    half = float(stats.t.ppf(0.975, len(known) - 1) * np.std(known, ddof=1)) / math.sqrt(len(known))
    return [float(np.mean(known)) - half, float(np.mean(known)) + half]


def compared(envelope: Sequence[Mapping[str, Any]], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bytes of files of ours over NNC's at equal accuracy, and the accuracy gained at equal bytes."""
    sizes, accuracies = (
        dict(zip(ours["seeds"], ours["by_seed"][name], strict=True)) for name in ("file_bytes", "accuracy")
    )
    size, target = float(np.mean([*sizes.values()])), float(np.mean([*accuracies.values()]))
    mean = Curve([point["bytes"] for point in envelope], [point["test"] for point in envelope])
    theirs, at_bytes = mean.bytes_at(target), mean.accuracy_at(size)
    ratios: list[float | None] = []
    gains: list[float | None] = []
    for place, seed in enumerate(envelope[0]["by_seed"]["seed"]):
        if seed in sizes:
            alone = Curve(*([point["by_seed"][of][place] for point in envelope] for of in ("bytes", "test")))
            reached, there = alone.bytes_at(accuracies[seed]), alone.accuracy_at(sizes[seed])
            ratios.append(None if reached is None else sizes[seed] / reached)
            gains.append(None if there is None else accuracies[seed] - there)
    logarithms = interval([ratio and math.log(ratio) for ratio in ratios])
    return {
        "variant": ours["variant"],
        "bytes": size,
        "accuracy": target,
        "nnc_bytes": theirs,
        "ratio": theirs and size / theirs,
        "ratio_by_seed": ratios,
        "ratio_interval": logarithms and [math.exp(end) for end in logarithms],
        "nnc_accuracy": at_bytes,
        "gain": at_bytes and target - at_bytes,
        "gain_by_seed": gains,
        "gain_interval": interval(gains),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nncodec", required=True, help="python of the environment that nncodec is in")
    parser.add_argument("--ours", nargs="*", type=Path, default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--zeros", nargs="*", type=float, default=[0.8, 0.88, 0.93])
    parser.add_argument("--learning-rate", nargs="+", type=float, default=[0.05])
    parser.add_argument("--qp", nargs="+", type=int, default=[-23, -22, -21, -20, -19])
    parser.add_argument("--fp32-qp", nargs="+", type=int, default=[-26, -24, -22, -20])
    parser.add_argument("--lambda-scale", nargs="+", type=float, default=[1.0])
    parser.add_argument("--nonweight-qp", type=int, default=-22)
    parser.add_argument("--states", type=Path, default=Path("runs/nnc_bar"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    import torch
    from figures import write_figures

    torch.set_num_threads(1)
    args.states.mkdir(parents=True, exist_ok=True)
    rows = points(args)
    curves = {
        "fp32": envelope([row for row in rows if not row["zeros"]]),
        "fine_tuned": envelope([row for row in rows if row["zeros"]]),
    }
    ours = [(path.name, point) for path in args.ours for point in json.loads(path.read_text())["points"]]
    comparisons = [
        {"nnc": name, "file": file} | compared(curve, point)
        for name, curve in curves.items()
        for file, point in ours
        if curve
    ]
    for row in comparisons:
        print(row)
    write_figures(args.out, {"compared": comparisons, "curves": curves, "points": rows})


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve_streams()
    else:
        main()
