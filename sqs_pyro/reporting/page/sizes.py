"""Where the bytes of a packed file are: a treemap of them, and a table of its parts."""

import math
from collections.abc import Sequence

from sqs_pyro.reporting.page.chart import legend
from sqs_pyro.reporting.page.markup import Child, Markup, element
from sqs_pyro.reporting.page.numbers import short_bytes
from sqs_pyro.reporting.page.plain import Document
from sqs_pyro.reporting.page.table import table
from sqs_pyro.reporting.page.treemap import Tile, treemap

_KINDS = {  # of parts, in their order: class of the style sheet, and what they are
    "codes": ("codes", "codes"),
    "masks": ("masks", "masks of zeros"),
    "codebooks": ("codebooks", "codebooks and scales"),
    "tables": ("tables", "tables of the entropy coder"),
    "uncompressed": ("uncompressed", "not compressed"),
    "manifest": ("manifest", "manifest"),
    "header": ("header", "header"),
    "padding": ("header", "padding"),
}
_MOST_TILES = 400  # a picture of more has nothing to point at


def sizes(metrics: Document) -> list[Markup]:
    """Return the treemap of a run's file, its parts, and what is not compressed."""
    size = metrics["size"]
    parts = {name: bytes_ for name, bytes_ in size["parts"].items() if bytes_}
    kinds = dict.fromkeys(_KINDS[name][0] for name in parts if name in _KINDS)
    names = {
        "codes": "compressed tensors",
        **{class_: said for class_, said in _KINDS.values() if class_ != "codes"},
    }
    entries = [(f"part {kind}", "header" if kind == "header" else names[kind]) for kind in kinds]
    said = f"Treemap of {size['file_bytes']:,} bytes; the tables below have its figures."
    rows: list[list[Child]] = [
        [_KINDS.get(name, (name, name))[1], f"{bytes_:,}", f"{100 * bytes_ / size['file_bytes']:.1f}"]
        for name, bytes_ in parts.items()
    ]
    rows.append(["the file", f"{size['file_bytes']:,}", "100.0"])
    return [
        element("figure", legend(entries), treemap(_tiles(size), said), class_="wide"),
        element(
            "div",
            table("Bytes of the file by what they are for", ["part", "bytes", "%"], rows),
            _not_compressed(metrics),
            class_="columns",
        ),
    ]


def _tiles(size: Document) -> list[Tile]:
    tensors = [_tensor(index, tensor) for index, tensor in enumerate(size["tensors"])]
    tensors.sort(key=lambda tile: -tile.size)
    shown, rest = tensors[:_MOST_TILES], tensors[_MOST_TILES:]
    if rest:
        together = sum(tile.size for tile in rest)
        name = f"{len(rest)} smaller tensors"
        shown.append(Tile(name, {"codes": together}, f"{name}: {short_bytes(together)}"))
    for name in ("uncompressed", "manifest", "header", "padding"):
        bytes_ = size["parts"].get(name, 0)
        kind, said = _KINDS[name]
        shown.append(Tile(said, {kind: bytes_}, f"{said}: {bytes_:,} bytes"))
    return shown


def _tensor(index: int, tensor: Document) -> Tile:
    """Return the tile of a tensor, in its parts where they are known; files of older versions do not say them."""
    weights = max(math.prod(tensor["shape"]), 1)
    known = tensor.get("parts") or {"codes": tensor["bytes"]}
    bits = 8 * tensor["bytes"] / weights
    tip = f"{tensor['name']}: {tensor['bytes']:,} bytes, {bits:.2f} bits a weight"
    if len(known) > 1:
        tip += " (" + ", ".join(f"{name} {bytes_:,}" for name, bytes_ in known.items() if bytes_) + ")"
    parts = {_KINDS[name][0]: bytes_ for name, bytes_ in known.items() if bytes_}
    return Tile(tensor["name"], parts, tip, index)


def _not_compressed(metrics: Document) -> list[Markup]:
    coverage = metrics.get("coverage")
    share = metrics["size"].get("compressed_share")
    others: Sequence[Document] = metrics["size"].get("largest_uncompressed") or ()
    if coverage:
        text = f"{coverage['compressed']:,} of {coverage['total']:,} parameters are compressed. "
    elif share is not None:
        text = f"{100 * share:.1f} % of the network is compressed. "
    else:
        text = ""
    if others:
        text += (
            "The largest others: " + ", ".join(f"{other['name']} ({other['numel']:,})" for other in others) + "."
        )
    return [element("p", text, class_="note")] if text else []
