"""Transformers networks for a task, as modules from a minibatch to one tensor of predictions.

What transformers returns for two of three tasks is no tensor that a likelihood or a file could be judged by: spans
have two logits, and an encoder has no sentence embedding at all. Each has one thin module around the network.
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sqs_pyro.errors import NetworkError
from sqs_pyro.extras import needed_for
from sqs_pyro.networks.architectures import include_patterns
from sqs_pyro.networks.registry import register_network
from sqs_pyro.packing.stored import METADATA

_NO_MASS = -1e4  # a logit without probability that float16, too, can hold

#: The class of transformers that has the weights of each task's network.
AUTO_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "embedding": "AutoModel",
    "image_classification": "AutoModelForImageClassification",
}


class SpanNetwork(nn.Module):
    """Logits of where an answer begins and where it ends.

    Args:
        transformer: of transformers' ``AutoModelForQuestionAnswering``.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Return logits ``[B, 2, T]`` of starts and ends, those of padding without mass; inputs ``[B, T]``."""
        output = self.transformer(attention_mask=attention_mask, **inputs)
        logits = torch.stack([output.start_logits, output.end_logits], 1)  # 2 x [B, T] -> [B, 2, T]
        return logits.masked_fill(attention_mask[:, None] == 0, _NO_MASS)


class EmbeddingNetwork(nn.Module):
    """A text's embedding: the mean of the last hidden states over its tokens, of unit length.

    Args:
        transformer: of transformers' ``AutoModel``.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Return embeddings ``[B, D]``; inputs ``[B, T]`` each."""
        hidden = self.transformer(attention_mask=attention_mask, **inputs).last_hidden_state
        return F.normalize((hidden * attention_mask[..., None]).sum(1), dim=-1)  # length takes care of the count


#: Keys of a configuration that name a network of another library, for which that would ask its hub.
_FOREIGN = frozenset({"architecture", "backbone", "use_timm_backbone", "use_pretrained_backbone"})

_AROUND = {"question_answering": SpanNetwork, "embedding": EmbeddingNetwork}


def task_network(transformer: nn.Module, task: str) -> nn.Module:
    """Return a network of transformers as the network of a task, which packed files know how to build again.

    Args:
        transformer: of the class that :data:`AUTO_CLASSES` names.
        task: one of its keys.
    """
    net = _AROUND[task](transformer) if task in _AROUND else transformer
    config = json.loads(transformer.config.to_json_string())  # type: ignore[union-attr, operator]
    net.network_spec = {  # type: ignore[assignment]
        "name": transformers_network.__name__,
        "options": {"task": task, "config": _named_once(config)},
    }
    return net


def _named_once(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with one name for each class: a thousand names twice would count in a small file."""
    once = {key: value for key, value in config.items() if key != "label2id"}
    return once if _named_twice(once) == config else config


def _named_twice(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the numbers of its classes by their names, which transformers does not infer."""
    names = config.get("id2label")
    if not isinstance(names, Mapping) or "label2id" in config:
        return dict(config)
    return {**config, "label2id": {name: int(number) for number, name in names.items()}}


@register_network("transformers_network")
def transformers_network(task: str, config: Mapping[str, Any]) -> nn.Module:
    """Return a task's network without its weights.

    Args:
        task: a key of :data:`AUTO_CLASSES`.
        config: what the network's ``config.to_json_string()`` says.

    Raises:
        MissingPackageError: transformers is not installed.
        NetworkError: it does not know the network, or the task is unknown.
    """
    if task not in AUTO_CLASSES:
        raise NetworkError(f"Task {task!r} is unknown: known are {', '.join(AUTO_CLASSES)}.")
    if foreign := foreign_key(config):
        raise NetworkError(
            f"A {config.get('model_type')!r} network with {foreign!r} is built by another library, which might "
            "fetch it: load the network in Python by yourself, or name it as timm/NAME."
        )
    with needed_for("Networks of tasks"):
        transformers = importlib.import_module("transformers")
    try:
        made = transformers.AutoConfig.for_model(**_named_twice(config))
        transformer = getattr(transformers, AUTO_CLASSES[task]).from_config(made, trust_remote_code=False)
    except (ValueError, TypeError, KeyError) as error:
        raise NetworkError(
            f"transformers cannot build a {config.get('model_type')!r} network for {task} ({error}): "
            "install the release that the checkpoint was made with."
        ) from None
    return task_network(transformer, task)


def foreign_key(config: Any) -> str | None:
    """Return a key of a configuration, or of one inside it, by which another library would build the network."""
    if not isinstance(config, Mapping):
        return None
    return next((key for key in config if key in _FOREIGN and config[key]), None) or next(
        filter(None, map(foreign_key, config.values())), None
    )


def transformer_in(net: nn.Module) -> nn.Module:
    """Return the network of transformers in a task's network, packed or not.

    A packed one takes the file's metadata along: :func:`sqs_pyro.integrations.save_pretrained` writes it as a
    checkpoint that ``AutoModelForQuestionAnswering.from_pretrained`` or another of its kind reads.
    """
    if not isinstance(net, tuple(_AROUND.values())):
        return net
    inner = net.get_submodule("transformer")
    if hasattr(net, METADATA):
        setattr(inner, METADATA, getattr(net, METADATA))
    return inner


def include_parts(net: nn.Module, parts: Sequence[str]) -> tuple[str, ...]:
    """Return patterns of the weights of some parts of a task's network, see :func:`include_patterns`."""
    inner = transformer_in(net)
    before = "" if inner is net else r"transformer\."  # names in the module around it
    return tuple(f"^{before}{pattern.removeprefix('^')}" for pattern in include_patterns(inner, parts))
