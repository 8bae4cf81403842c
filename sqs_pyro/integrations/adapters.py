"""LoRA adapters of PEFT on packed layers: a compressed model is fine-tuned without being unpacked.

Packed weights stay as they are, gradients flow through them to the adapters, and these are saved by themselves.
"""

import warnings
from typing import TYPE_CHECKING, Any

from sqs_pyro.errors import NetworkError
from sqs_pyro.extras import needed_for
from sqs_pyro.kernels.modules import PackedLinear

if TYPE_CHECKING:
    from peft import LoraConfig

#: Initial weights of adapters that leave the weight below them as it is.
_INITIAL = (True, False, "gaussian")


def lora_on_packed(config: "LoraConfig") -> "LoraConfig":
    """Let a LoRA configuration of PEFT put its adapters on packed linear layers, too; return it.

    ``get_peft_model(packed, lora_on_packed(LoraConfig(target_modules=["q_proj"])))``; to load an adapter that was
    saved: ``PeftModel.from_pretrained(packed, path, config=lora_on_packed(LoraConfig.from_pretrained(path)))``.

    Args:
        config: how; what changes or reads the weights below (DoRA, PiSSA, OLoRA, LoftQ, ...) is refused as soon as
            adapters are made, and so is merging them, for packed weights do not change.

    Raises:
        MissingPackageError: PEFT is not installed.
        NetworkError: ``init_lora_weights`` changes the weights below.
    """
    if config.init_lora_weights not in _INITIAL:
        raise NetworkError(
            f"init_lora_weights is {config.init_lora_weights!r}, which changes the weights below, and packed ones "
            "do not change: give True or 'gaussian', or unpack the network first with dequantize()."
        )
    config._register_custom_module({PackedLinear: _lora_class()})
    return config


def _lora_class() -> type:
    with needed_for("LoRA adapters"):
        from peft.tuners.lora import Linear

    class LoraPackedLinear(Linear):
        """A packed linear layer and its adapters."""

        def __init__(self, base_layer: PackedLinear, adapter_name: str, *args: Any, **kwargs: Any) -> None:
            with warnings.catch_warnings():  # it finds the features of a layer that it does not know, and says so
                warnings.filterwarnings("ignore", "Unsupported layer type")
                super().__init__(base_layer, adapter_name, *args, **kwargs)

        def resolve_lora_variant(self, **options: Any) -> None:
            """Return None: plain LoRA, which alone leaves the weights below alone."""
            if super().resolve_lora_variant(**options) is not None:
                raise NetworkError(
                    "This configuration is of a variant of LoRA that reads or changes the weights below, but they "
                    "are packed: leave the variant out, or unpack the network first with dequantize()."
                )

        def merge(self, *args: Any, **kwargs: Any) -> None:
            """Refuse: packed weights do not change."""
            raise NetworkError(
                "Adapters cannot be merged into packed weights, which do not change: keep them beside, or load "
                "the network with dequantize=True, put the adapter on it and merge there."
            )

    return LoraPackedLinear
