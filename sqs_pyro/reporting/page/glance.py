"""The first that a page of a run shows: what was got, in a few large numbers, and beside it what was asked for."""

from sqs_pyro.reporting.figures import figures_of
from sqs_pyro.reporting.kept import kept_in_words
from sqs_pyro.reporting.own_settings import own_settings
from sqs_pyro.reporting.page.markup import Child, Markup, element
from sqs_pyro.reporting.page.numbers import short_bytes, short_time, written
from sqs_pyro.reporting.page.plain import Document, at, headline, is_language_model
from sqs_pyro.reporting.page.table import pairs


def glance(metrics: Document, recipe: Document) -> Markup:
    """Return the large numbers of a run."""
    size = metrics["size"]
    asked = at(recipe, "compression.target_ratio")
    cards = [
        _card(
            "smaller than fp32",
            f"{size['ratio']:.1f}×",
            f"{written(asked, 'g')}× was asked for" if asked else "the whole file counts",
        ),
        _card("size", f"{short_bytes(size['file_bytes'])}", f"fp32 {short_bytes(size['fp32_bytes'])}"),
        *_quality(metrics),
        _card("a compressed weight", f"{size['bits_per_weight']:.2f} bits", "instead of 32"),
        _card("zeros", f"{100 * (1 - metrics['size']['nonzero_rate']):.1f} %", "of the compressed weights"),
        *_latency(metrics),
        _card("compression took", short_time(metrics["seconds"]), ""),
    ]
    return element("dl", cards, class_="cards")


def asked(metrics: Document, recipe: Document) -> Markup:
    """Return a table of what a recipe asks for and what came of it."""
    size = metrics["size"]
    scheduled = at(recipe, "compression.target_ratio") is None and at(recipe, "compression.allocation") != (
        "rate_distortion"
    )
    components = [tensor["components"] for tensor in size["tensors"] if tensor.get("components")]
    rows: list[tuple[Child, ...]] = [
        ("network", at(recipe, "network.name") or at(recipe, "network.path"), None),
        ("data", at(recipe, "data.name") or at(recipe, "data.source") or at(recipe, "text.source"), None),
        ("task", at(recipe, "task") or at(recipe, "data.task"), None),
        ("prior", at(recipe, "compression.prior.kind"), None),
        ("zeros and bits by", at(recipe, "compression.allocation") or at(recipe, "blockwise.allocation"), None),
        ("epochs", at(recipe, "compression.epochs"), None),
        *(
            (f"patience of the {section}", at(recipe, f"{section}.patience"), kept_in_words(kept, section))
            for section, kept in metrics.get("kept", {}).items()
        ),
        ("ratio", written(at(recipe, "compression.target_ratio"), "g"), f"{size['ratio']:.2f}"),
        ("bits a compressed weight", written(at(recipe, "blockwise.bits"), "g"), f"{size['bits_per_weight']:.3f}"),
        (
            "non-zero weights",
            f"{100 * at(recipe, 'compression.nonzero_rate'):.2f} %"
            if scheduled and at(recipe, "compression.nonzero_rate")
            else None,
            f"{100 * metrics['size']['nonzero_rate']:.2f} %",
        ),
        (
            "values of a codebook",
            at(recipe, "compression.num_components") or at(recipe, "blockwise.num_components"),
            f"up to {max(components)}" if components else None,
        ),
        *((f"layers {pattern}", said, None) for pattern, said in own_settings(recipe).items()),
        ("seed", metrics["seed"], None),
    ]
    shown = [row for row in rows if row[1] not in (None, "", "–") or row[2]]
    filled = [tuple("–" if cell in (None, "") else cell for cell in row) for row in shown]
    return pairs("What was asked for, and what came of it", filled, ("", "asked", "got"))


def _card(label: str, value: str, note: str) -> Markup:
    inner = [element("dt", label), element("dd", value, class_="value")]
    return element("div", inner, element("dd", note, class_="note") if note else None, class_="card")


def _quality(metrics: Document) -> list[Markup]:
    if is_language_model(metrics):
        name = next(iter(metrics["compressed"]))
        before, after = (metrics[which][name]["perplexity"] for which in ("baseline", "compressed"))
        ratio = metrics["perplexity_ratio"][name]
        note = f"{name.replace('_', ' ')}" + ("" if ratio is None else f", {ratio:.3f} times as large")
        return [_card("perplexity", f"{written(before, '.2f')} → {written(after, '.2f')}", note)]
    figure = headline(metrics)
    if figure is None:
        return []
    label, factor, form = figures_of([metrics["compressed"]]).get(figure, (figure, 1, ".4f"))
    before, after = (metrics[which][figure] for which in ("baseline", "compressed"))
    name, _, unit = label.partition(", ")
    change = factor * (after - before)
    points = "points" if unit == "%" else ""
    value = f"{factor * before:{form}} → {factor * after:{form}} {unit}".rstrip()
    return [_card(f"{name} on test data", value, f"{change:+{form}} {points}".replace("-", "−").rstrip())]


def _latency(metrics: Document) -> list[Markup]:
    times = at(metrics, "latency.batch.1")
    if not times:
        return []
    before, after = times["dense_ms"], times["packed_ms"]
    return [_card("a call, batch 1", f"{before:.3g} → {after:.3g} ms", f"{before / after:.2f} times as fast")]
