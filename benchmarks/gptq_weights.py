"""GPTQ of llm-compressor: the weights that it leaves, dequantised, for a benchmark that judges every method alike.

llm-compressor wants older transformers than this project, so it runs in an environment of its own::

    python -m venv GPTQ && GPTQ/bin/pip install llmcompressor gguf pyro-ppl
    GPTQ/bin/python benchmarks/gptq_weights.py CALIBRATION.pt WEIGHTS.safetensors --bits 3 --group 96

CALIBRATION.pt holds token sequences ``[n, length]``. An asymmetric grid for each group of inputs of each output,
activation order, all linear layers but the head: `bits + (16 + bits) / group` bits a weight.
"""

import tempfile

import torch
from packaged_weights import language_model, weights_arguments
from safetensors.torch import save_file


def main() -> None:
    args = weights_arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    net, tokenizer = language_model(
        args.packages
    )  # imports sqs_pyro, which repairs an unusable torchvision, first

    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    sequences = torch.load(args.calibration, weights_only=True)
    grid = QuantizationArgs(num_bits=args.bits, symmetric=False, strategy="group", group_size=args.group)
    scheme = QuantizationScheme(targets=["Linear"], weights=grid)
    with tempfile.TemporaryDirectory() as directory:  # oneshot reads the configuration of a checkpoint
        del net.config.quantization_config  # of the GGUF file, whose weights are dequantised
        net.config.save_pretrained(directory)
        net.config._name_or_path = directory
        oneshot(
            model=net,
            tokenizer=tokenizer,
            dataset=Dataset.from_dict({"input_ids": sequences.tolist()}),
            recipe=[GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"], actorder="weight")],
            num_calibration_samples=len(sequences),
            max_seq_length=sequences.shape[1],
        )
    layers = {name: module.weight for name, module in net.named_modules() if isinstance(module, torch.nn.Linear)}
    save_file(
        {name: weight.detach().contiguous() for name, weight in layers.items() if name != "lm_head"}, args.weights
    )


if __name__ == "__main__":
    main()
