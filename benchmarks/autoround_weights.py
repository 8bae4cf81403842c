"""AutoRound: the weights that it leaves, dequantised, for a benchmark that judges every method alike.

It runs in an environment of its own, as its needs are not this project's::

    python -m venv AUTOROUND && AUTOROUND/bin/pip install auto-round gguf pyro-ppl
    AUTOROUND/bin/python benchmarks/autoround_weights.py CALIBRATION.pt WEIGHTS.safetensors --bits 3 --group 96

CALIBRATION.pt holds token sequences ``[n, length]``. An asymmetric grid for each group of inputs of each output,
rounding and range learned by signed gradient descent block after block, all linear layers but the head:
`bits + (16 + bits) / group` bits a weight.
"""

import torch
from packaged_weights import language_model, weights_arguments
from safetensors.torch import save_file


def main() -> None:
    parser = weights_arguments(__doc__)
    parser.add_argument("--iterations", type=int, default=200, help="of each block; AutoRound's own are 200")
    parser.add_argument("--batch", type=int, default=8, help="sequences of an iteration; AutoRound's own are 8")
    parser.add_argument("--blocks", type=int, nargs="*", default=[], help="which; all if left out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # Imports sqs_pyro, which repairs an unusable torchvision, first.
    net, tokenizer = language_model(args.packages)

    from auto_round import AutoRound

    sequences = torch.load(args.calibration, weights_only=True)
    del net.config.quantization_config  # of the GGUF file, whose weights are dequantised
    layers = {name: module for name, module in net.named_modules() if isinstance(module, torch.nn.Linear)}
    of_blocks = {name for name in layers if any(f".layers.{i}." in name for i in args.blocks)}
    left = set(layers) - of_blocks if args.blocks else {"lm_head"}
    rounding = AutoRound(
        net,
        tokenizer,
        scheme=f"W{args.bits}A16",
        group_size=args.group,
        sym=False,
        layer_config={name: {"bits": 16} for name in left},
        iters=args.iterations,
        batch_size=args.batch,
        dataset=list(sequences.split(args.batch)),
        nsamples=len(sequences),
        seqlen=sequences.shape[1],
        device_map="cpu",
        enable_torch_compile=False,
    )
    net, _ = rounding.quantize()
    weights = {name: net.get_submodule(name).weight.detach().float() for name in layers if name not in left}
    save_file({name: weight.contiguous() for name, weight in weights.items()}, args.weights)


if __name__ == "__main__":
    main()
