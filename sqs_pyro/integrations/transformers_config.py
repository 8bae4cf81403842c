"""``SQSConfig``: what the config.json of a packed checkpoint says about its tensors."""

from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from sqs_pyro.documents import shown
from sqs_pyro.errors import PackedFileError
from sqs_pyro.integrations.pending import STORED
from sqs_pyro.integrations.records import read_record
from sqs_pyro.packing.layouts import SCALE_BYTES
from sqs_pyro.packing.record import TensorRecord
from sqs_pyro.packing.stored import WEIGHT_PREFIX

METHOD = "sqs"
CHECKPOINT_VERSION = 3  # the newest: scales of parts of out-channels; one without any scales stays version 1


class SQSConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a packed checkpoint: plain JSON, written by saving, never by hand.

    Args:
        tensors: a record for each compressed tensor by parameter name: ``shape``, ``layout``, ``bits``,
            ``nonzeros``, ``groups``, ``components``, ``codebook``, ``crc32`` as in docs/format.md, and the names
            (``parts``) and bytes (``lengths``) of its parts.
        shared: further names of compressed parameters, and the names under which ``tensors`` has them.
        leftovers: CRC-32 of every other tensor of the checkpoint, by name.
        metadata: ``"network"``, ``"recipe"``, ``"metrics"``, as in a packed file.
        dequantize: whether loading gives a plain dense network.
        format_version: of the checkpoint; None takes the oldest that can say what ``tensors`` says.
        quant_method: ``"sqs"``.
        others: what there is not; transformers hands over whatever stands in config.json.

    Raises:
        PackedFileError: for a newer version, an unknown key, or a value of the wrong type.
    """

    def __init__(
        self,
        tensors: Mapping[str, Mapping[str, Any]] | None = None,
        shared: Mapping[str, str] | None = None,
        leftovers: Mapping[str, int] | None = None,
        metadata: Mapping[str, Any] | None = None,
        dequantize: bool = False,
        format_version: int | None = None,
        quant_method: str = METHOD,
        **others: Any,
    ) -> None:
        # Written: the oldest version that can say it. Read: config.json states one.
        if format_version is None:
            format_version = _version(tensors)
        _check_version(format_version)
        if quant_method != METHOD:
            raise PackedFileError(f"The quantization method is {shown(quant_method)}, but {METHOD!r} is needed.")
        # Unknown keys come from a newer program, and may change what the others mean.
        if others:
            raise PackedFileError(
                f"The quantization config has the unknown key {shown(next(iter(others)))}: fetch config.json "
                "again, or update sqs-pyro."
            )
        # Plain attributes of plain JSON: transformers copies, compares and writes a config by its `__dict__`.
        self.quant_method, self.format_version, self.dequantize = METHOD, format_version, bool(dequantize)
        self.tensors = _mapping("tensors", tensors)
        self.shared = _mapping("shared", shared)
        self.leftovers = _mapping("leftovers", leftovers)
        self.metadata = _mapping("metadata", metadata)
        # Shapes and bytes are checked when tensors are asked for; this needs no more than the names.
        for name, first in self.shared.items():
            if not isinstance(first, str) or first not in self.tensors:
                raise PackedFileError(
                    f"Tensor {shown(name)} shares the bytes of {shown(first)}, which is not described: fetch "
                    "config.json again."
                )

    def stored_tensors(self) -> dict[str, TensorRecord]:
        """Return the descriptions of the compressed tensors by parameter name, checked.

        Raises:
            PackedFileError: naming the tensor and the reason.
        """
        return {name: read_record(name, record) for name, record in self.tensors.items()}


def stored_name(parameter: str) -> str:
    """Return the name that the bytes of a compressed parameter have in a checkpoint."""
    owner, _, attribute = parameter.rpartition(".")
    return f"{owner}{'.' if owner else ''}{WEIGHT_PREFIX}{attribute}.{STORED}"


def _version(tensors: Mapping[str, Any] | None) -> int:
    records = tensors.values() if isinstance(tensors, Mapping) else ()
    # Readers that do not know the part, or only one of a scale for each out-channel, would refuse the tensor
    # without a reason.
    return max((_version_of(record) for record in records), default=1)


def _version_of(record: Any) -> int:
    try:
        scales = dict(zip(record["parts"], record["lengths"], strict=True))["scales"]
        return 2 if scales == SCALE_BYTES * record["shape"][0] else 3
    except (TypeError, KeyError, IndexError, ValueError):
        return 1  # it has none, or is told to be wrong when its tensor is asked for


def _check_version(version: int) -> None:
    if type(version) is not int or version < 1:
        raise PackedFileError(
            f"The checkpoint's format version is {shown(version)}, which is not a number above 0."
        )
    if version > CHECKPOINT_VERSION:
        raise PackedFileError(
            f"The checkpoint has format version {version}, this program reads up to {CHECKPOINT_VERSION}: update "
            "sqs-pyro."
        )


def _mapping(key: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise PackedFileError(
            f"The quantization config's {key!r} is a {type(value).__name__}, but should be an object: fetch "
            "config.json again."
        )
    return dict(value)
