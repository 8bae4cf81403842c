"""``SQSQuantizer``: how transformers loads, saves and unpacks a packed network.

Importing this module registers it; :mod:`sqs_pyro.integrations` does that when transformers is imported.
"""

import copy
import json
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from sqs_pyro.errors import NetworkError, PackedFileError
from sqs_pyro.integrations import pending
from sqs_pyro.integrations.checkpoint_documents import CONFIG_DIGEST, check_config, config_digest, read_config
from sqs_pyro.integrations.checkpoint_files import check_files, read_tensor
from sqs_pyro.integrations.records import record_of, stored_bytes
from sqs_pyro.integrations.transformers_config import METHOD, SQSConfig, stored_name
from sqs_pyro.kernels.network import after_packing
from sqs_pyro.kernels.placing import unpack_weights
from sqs_pyro.networks.linear_form import LinearForm, from_linear_form, to_linear_form
from sqs_pyro.packing.contents import contents_of
from sqs_pyro.packing.finite import check_finite
from sqs_pyro.packing.leftovers import checksum, to_bytes
from sqs_pyro.packing.stored import METADATA, WEIGHT_PREFIX, stored_weights

#: Of the names that :func:`stored_name` gives.
_STORED_NAMES = rf"(^|\.){WEIGHT_PREFIX}[^.]+\.{pending.STORED}$"

# Not by decorating the class: transformers_config must not import the module whose import runs this one.
register_quantization_config(METHOD)(SQSConfig)


@register_quantizer(METHOD)
class SQSQuantizer(HfQuantizer):
    """Loads packed modules instead of dense ones, and saves the stored form of their weights.

    Raises:
        NetworkError: if a dense checkpoint is to be compressed while it is loaded.
    """

    requires_calibration = True
    is_trainable = False
    is_compileable = True

    quantization_config: SQSConfig

    def __init__(self, quantization_config: SQSConfig, **kwargs: Any) -> None:
        # transformers asks this of every method: whether to quantise a dense checkpoint while it loads.
        if not kwargs.get("pre_quantized", True):
            raise NetworkError(
                "SQS does not compress a network while it is loaded: load it as it is, and call sqs_pyro.compress."
            )
        super().__init__(quantization_config, **kwargs)

    def is_serializable(self) -> bool:
        """Return True: packed networks can be saved."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a ``device_map`` that offloads.

        Raises:
            NetworkError: it names the disk, or both CPU and GPU.
        """
        _check_places(kwargs.get("device_map"))

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Check config and files, then replace modules on the meta device."""
        config = self.quantization_config
        tensors = config.stored_tensors()
        read, guards = None, set()
        if kwargs.get("checkpoint_files"):
            directory = Path(kwargs["checkpoint_files"][0]).parent
            # All files before any module is touched: what is damaged says so, instead of a half-loaded network.
            check_config(read_config(directory, PackedFileError), kwargs["checkpoint_files"])
            sizes = {stored_name(name): tensor.bytes for name, tensor in tensors.items()}
            files = check_files(kwargs["checkpoint_files"], sizes, config.leftovers)
            guards = files.keys() & tensors.keys()

            def read(name: str) -> Tensor:
                stored = stored_name(saved[name])
                return read_tensor(files[stored], stored)

        # Tensors of the file that no module asks for: the digest, the guard, and what is read when it is decoded,
        # tensor by tensor; transformers would read all of it before. Without this it would warn of them.
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            f"^{CONFIG_DIGEST}$",
            *(f"^{re.escape(name)}$" for name in _every_name(model, guards)),
            *([] if read is None else [_STORED_NAMES]),
        }
        # Tensors of the linear form say that the checkpoint is of a network in that form.
        to_linear_form(model, _every_name(model, [*tensors, *config.leftovers]))
        local = _local_names(model, [*tensors, *config.shared])
        shared = {
            local[name]: local[first] for name, first in config.shared.items() if {name, first} <= local.keys()
        }
        saved = {local[name]: name for name in tensors if name in local}
        try:
            pending.reserve(model, {name: tensors[saved[name]] for name in saved}, shared, read)
        except NetworkError as error:
            raise PackedFileError(f"The checkpoint was made for another {type(model).__name__}. {error}") from None
        # After `reserve`: transformers ties parameters by name, and these are no parameters any more.
        _untie(model, local.values())

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Decode what was loaded to its run-time form, tensor by tensor."""
        _check_places(getattr(model, "hf_device_map", None))  # what "auto" has come to
        pending.complete(model)
        if self.quantization_config.dequantize:
            # A dense network of transformers, as if it had never been packed.
            return _tie_again(from_linear_form(unpack_weights(model)))
        check_finite(model)
        setattr(model, METADATA, self.quantization_config.metadata)
        model._weight_conversions = []
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the stored form of all tensors, and describe it in the model's config.

        Raises:
            NetworkError: the model is no packed network any more.
        """
        contents = contents_of(model)
        leftovers = dict(contents.leftovers)
        # As `save_pretrained` would: a file without them must not be said to have them.
        for name in model._keys_to_ignore_on_save or ():
            leftovers.pop(name, None)
        # First names, then every name: what differs between them is shared.
        names = {id(weight): name for name, weight in stored_weights(model).items()}
        every = {name: names[id(weight)] for name, weight in stored_weights(model, every_name=True).items()}
        # transformers writes the model's config after this: it has to say what the tensors below are.
        self.quantization_config = model.config.quantization_config = SQSConfig(
            tensors={record.name: record_of(record) for record in contents.records()},
            shared={name: first for name, first in every.items() if name != first},
            leftovers={name: checksum([to_bytes(value)]) for name, value in leftovers.items()},
            metadata=contents.metadata,
        )
        stored = {stored_name(name): stored_bytes(packed) for name, packed in contents.tensors.items()}
        own = {**leftovers, **_guard(model, contents.tensors), CONFIG_DIGEST: config_digest(_config_to_be(model))}
        return {**stored, **own}, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Make ``model`` a plain dense network, in place."""
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        unpack_weights(model, wanted)
        if wanted is not None:
            for parameter in model.parameters():  # not buffers: rotary frequencies would lose their precision
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(wanted)
        _tie_again(from_linear_form(model))
        if hasattr(model, METADATA):
            delattr(model, METADATA)
        return model


@after_packing
def attach(packed: nn.Module) -> None:
    """Let a packed network of transformers know its quantizer, so that its own ``save_pretrained`` is right."""
    from transformers.modeling_utils import PreTrainedModel  # not at the top: it is what imports this module

    if isinstance(packed, PreTrainedModel):
        packed.hf_quantizer = SQSQuantizer(SQSConfig())
        # Names stay the network's own: those of an original checkpoint would have to be translated twice.
        packed._weight_conversions = []
        _untie(packed, stored_weights(packed, every_name=True))


def _guard(model: nn.Module, packed: Iterable[str]) -> dict[str, Tensor]:
    """Return a tensor of no numbers under the own name of a compressed one.

    Without sqs_pyro transformers would only warn that it does not know the method, and draw what it misses at
    random; because of a tensor that has another shape than the network's it refuses the whole checkpoint.
    """
    names = (name for name in packed if not _in_linear_form(model, name))  # others the plain network does not have
    return {name: torch.empty(0, dtype=torch.uint8) for name in islice(names, 1)}


def _in_linear_form(model: nn.Module, name: str) -> bool:
    path = name.split(".")[:-1]
    return any(isinstance(model.get_submodule(".".join(path[:i])), LinearForm) for i in range(1, len(path) + 1))


def _check_places(device_map: Any) -> None:
    places = {str(place) for place in device_map.values()} if isinstance(device_map, Mapping) else set()
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise NetworkError(
            f"device_map sends a packed network to {', '.join(sorted(places))}, but it cannot be offloaded: "
            'choose GPUs only, or "cpu" for all of it.'
        )


def _config_to_be(model: Any) -> dict[str, Any]:
    """Return what ``save_pretrained`` will write into config.json, after the tensors have been asked for."""
    # The digest is stored beside the tensors, which transformers asks for before it writes the config itself.
    config = copy.copy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    return json.loads(config.to_json_string(use_diff=True))


def _local_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the tensors' names in ``model``, which may be the base of the saved network, or have it as its base.

    Those of a head that ``model`` does not have are left out.
    """
    # "model." of a causal language model, whose base is loaded or saved without it.
    prefix = f"{model.base_model_prefix}."
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    is_same = type(model).__name__ in (model.config.architectures or ())
    local = {}
    for name in names:
        candidates = (name, name.removeprefix(prefix), prefix + name)  # as in `_every_name`, by precedence
        found = next((candidate for candidate in candidates if candidate in known), None)
        if found is not None:
            local[name] = found
        elif is_same or name.startswith(prefix):
            local[name] = name  # should be there: that it is not will be reported with its name
    return local


def _every_name(model: Any, names: Iterable[str]) -> set[str]:
    """Return names of tensors as they are in a model, its base, or the network around it."""
    prefix = f"{model.base_model_prefix}."
    return {each for name in names for each in (name, name.removeprefix(prefix), prefix + name)}


def _untie(model: Any, packed: Iterable[str]) -> None:
    """Take packed parameters out of what transformers ties: they share one weight by themselves."""
    names = set(packed)
    for path, module in model.named_modules():
        for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
            tied = getattr(module, attribute, None)
            if isinstance(tied, dict):
                start = f"{path}." if path else ""
                kept = {k: v for k, v in tied.items() if not names & {start + k, start + v}}
                if len(kept) < len(tied):
                    # On the instance: the class's own dictionary is that of all its networks.
                    setattr(module, attribute, kept)


def _tie_again(model: Any) -> Any:
    """Give a dense network back what :func:`_untie` has taken; its parameters are shared already."""
    for module in model.modules():
        module.__dict__.pop("_tied_weights_keys", None)
        if hasattr(module, "get_expanded_tied_weights_keys"):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)
    return model
