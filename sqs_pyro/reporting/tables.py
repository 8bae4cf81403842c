"""Tables of what was measured: dictionaries in, reports that print themselves out; fractions become percent."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from sqs_pyro.reporting.figures import FIGURES, figures_of
from sqs_pyro.reporting.fitted import FittedTable, Line
from sqs_pyro.reporting.kept import kept_in_words
from sqs_pyro.reporting.own_settings import own_settings
from sqs_pyro.reporting.printed import Report

Document = Mapping[str, Any]


def run_tables(metrics: Document) -> Report:
    """Return the result of a run: fp32 network and packed file side by side, and what the file weighs."""
    title = f"{metrics['name'] or 'run'}, seed {metrics['seed']}"
    searched = [search_table(metrics["search"])] if "search" in metrics else []
    if "perplexity_ratio" in metrics:  # a language model's
        figures = [_perplexity_table(metrics), *searched]
        return Report(_title(title), *figures, _size_table(metrics, metrics["seconds"]))
    networks: list[tuple[str, Document]] = [("fp32", metrics["baseline"]), ("packed file", metrics["compressed"])]
    if "averaged" in metrics:
        networks.append(("posterior mean", metrics["posterior_mean"]))
        networks.append((f"average of {metrics['averaged']['samples']}", metrics["averaged"]))
    table = _figures_table(dict(networks), entropy=False)
    timed = [latency_table(metrics["latency"])] if "latency" in metrics else []
    kept = [kept_table(metrics["kept"])] if "kept" in metrics else []
    return Report(_title(title), table, *searched, *kept, *timed, _size_table(metrics, metrics["seconds"]))


def kept_table(kept: Document) -> FittedTable:
    """Return which weights were kept where there was patience: a row a section."""
    table = FittedTable("patience", "weights", words=("weights",))
    for section, own in kept.items():
        table.add_row(section, kept_in_words(own, section))
    return table


def search_table(search: Document) -> FittedTable:
    """Return what was tried on the way to a size: a row an attempt; of what is not trained bits for epochs."""
    title = f"at most {search['points']:g} points"
    table = FittedTable(title, "ratio", "points lost", "bytes", search_column(search), "")
    for i, each in enumerate(search["attempts"]):
        note = "chosen" if i == search["chosen"] else ""
        figures = f"{each['ratio']:.1f}", f"{each['points']:+.2f}", f"{each['bytes']:,}", search_cell(each)
        table.add_row(f"try {i + 1}", *figures, note)
    return table


def search_column(search: Document) -> str:
    """Return what the last column of a search's table has: epochs that attempts took, or the bits they were of."""
    return "bits" if search["attempts"][0]["epochs"] is None else "epochs"


def search_cell(attempt: Document) -> str:
    """Return what an attempt has in that column."""
    return f"{attempt['target']:.2f}" if attempt["epochs"] is None else str(attempt["epochs"])


def latency_table(measured: Document) -> FittedTable:
    """Return how long a call takes: a row a batch."""
    table = FittedTable("a call", "dense, ms", "packed, ms", "times as fast")
    for batch, own in measured["batch"].items():
        before, after = own["dense_ms"], own["packed_ms"]
        table.add_row(f"batch {batch}", f"{before:.3g}", f"{after:.3g}", f"{before / after:.2f}")
    return table


def evaluation_tables(evaluation: Document) -> Report:
    """Return the evaluation of a packed file."""
    if "perplexity" in evaluation:
        table = _perplexity_table({"compressed": evaluation["perplexity"]})
        return Report(_title(str(evaluation["file"])), table, _size_table(evaluation))
    shift = f", shifted by {evaluation['shift']}" if evaluation.get("shift") else ""
    title = f"{evaluation['file']} on {evaluation['num_examples']:,} test examples{shift}"
    return Report(_title(title), _figures_table({"packed file": evaluation}), _size_table(evaluation))


def uncertainty_tables(document: Document) -> Report:
    """Return what a packed classifier's uncertainty is worth: a column a predictor."""
    predictors = document["predictors"]
    first = next(iter(predictors.values()))
    table = _figures_table(predictors)
    table.add_row(
        "risk-coverage area, %", *(f"{100 * own['risk_coverage_area']:.2f}" for own in predictors.values())
    )
    for name in first["entropy_auroc"]:
        table.add_row(f"AUROC, {name}", *(f"{own['entropy_auroc'][name]:.4f}" for own in predictors.values()))
        information = [own["information_auroc"].get(name) for own in predictors.values()]
        if any(score is not None for score in information):
            table.add_row(f"by mutual information, {name}", *(_number(score, ".4f") for score in information))
    for name in first["shifted"]:
        for key, (label, factor, form) in FIGURES.items():
            if key in first["shifted"][name]:
                shifted = (own["shifted"][name][key] for own in predictors.values())
                table.add_row(f"{label}, {name}", *(f"{factor * value:{form}}" for value in shifted))
    title = f"{document['file']} on {first['num_examples']:,} test examples"
    legend = f"scaled: probabilities at the temperature {document['temperature']:.3g}, fitted on validation data"
    return Report(_title(title), table, Line(legend), _size_table(document))


def export_tables(document: Document) -> Report:
    """Return what an export weighs, how far it is from the packed network, what became of compressed tensors."""
    format_, dtype = document["format"], document["dtype"]
    size = FittedTable(f"{format_}, {dtype}" if dtype else format_, "")
    for name, value in document["bytes"].items():
        size.add_row(f"{name}, bytes", f"{value:,}")
    size.add_row("packed file, bytes", f"{document['packed_bytes']:,}")
    size.add_row("fp32 network, bytes", f"{document['dense_bytes']:,}")
    size.add_row("largest difference of outputs", _number(document["max_difference"], ".2g"))
    tensors = FittedTable("tensor", "", "how, or why", words=("", "how, or why"))
    for kind in ("packed", "decoded"):
        for name, said in document[kind].items():
            tensors.add_row(name, kind, said)
    return Report(_title(str(document["out"])), size, Line(f"example: {document['example']}"), tensors)


def inspection_tables(inspection: Document) -> Report:
    """Return what a packed file holds: a row a tensor and a row for everything else; they add up to the file."""
    size = inspection["size"]
    runtime = _runtime_tables(inspection["runtime"]) if "runtime" in inspection else ()
    recipe = inspection.get("metadata", {}).get("recipe")
    asked = _own_lines(recipe if isinstance(recipe, Mapping) else {})
    return Report(_title(str(inspection["file"])), *size_tables(size), *asked, *runtime)


def size_tables(size: Document) -> Report:
    """Return what a packed file weighs: a row a tensor, the whole, and what is not compressed."""
    return Report(_tensor_table(size), *_others(size), _size_table({"size": size}))


def _runtime_tables(runtime: Document) -> Report:
    """Return what weights are in memory, and why: a row a tensor."""
    table = FittedTable("tensor", "form", "packed, bytes", "decoded, bytes", "why", words=("form", "why"))
    for weight in runtime["weights"]:
        sizes = (f"{weight[part]:,}" if weight[part] else "" for part in ("packed_bytes", "decoded_bytes"))
        table.add_row(weight["name"], weight["form"], *sizes, weight["reason"])
    table.add_section()
    totals = (sum(weight[part] for weight in runtime["weights"]) for part in ("packed_bytes", "decoded_bytes"))
    table.add_row("together", "", *(f"{total:,}" for total in totals), "", bold=True)
    instructions = ", ".join(runtime["machine"]["instructions"]) or "none that matter"
    where = f"{runtime['machine']['processor']} ({instructions})"
    if products := runtime.get("bfloat16"):
        where += f", bfloat16 by {products}"
    if (device := runtime.get("device", "cpu")) != "cpu":
        where = device
    return Report(_title(f"At run time on {where}"), table)


def doctor_tables(document: Document) -> Report:
    """Return what a machine has, and what follows: a row a thing that was looked for."""
    table = FittedTable("", "", "found", "what follows", words=("", "found", "what follows"))
    for check in document["checks"]:
        table.add_row(check["what"], "ok" if check["good"] else "--", check["found"], check["follows"])
    machine = document["machine"]
    about = f"{machine['processor']}, {machine['threads']} thread(s), torch {machine['torch']}"
    return Report(_title(about), table)


def report_tables(run: Document) -> Report:
    """Return all that a finished run measured: networks, tensors, and the bounds on the KL."""
    metrics = run["metrics"]
    parts: list[RenderableType] = [*run_tables(metrics), *finding_lines(metrics.get("findings", ()))]
    parts += [_block_table(metrics), *_finish_lines(metrics)] if "blocks" in metrics else []
    parts += [_tensor_table(metrics["size"]), *_others(metrics["size"]), *_own_lines(run.get("recipe") or {})]
    return Report(*parts, *(bounds_tables(run["bounds"]) if "bounds" in run else ()))


def result_tables(result: Document) -> Report:
    """Return a compression's outcome in short.

    Args:
        result: ``size``, ``seconds``, ``validation`` (of the last evaluation, or None) and ``findings``.
    """
    table = _size_table(result, result["seconds"])
    if result["validation"] is not None:
        table.add_row("validation, %", f"{100 * result['validation']:.2f}")
    return Report(table, *_others(result["size"]), *finding_lines(result["findings"]))


def block_tables(result: Document) -> Report:
    """Return the outcome of a compression block after block.

    Args:
        result: ``blocks``, ``vocabulary``, ``finish``, ``size``, ``seconds``.
    """
    size = result["size"]
    return Report(
        _block_table(result), *_finish_lines(result), *_others(size), _size_table(result, result["seconds"])
    )


def finding_lines(findings: Sequence[Document]) -> list[Line]:
    """Return a line for each finding."""
    return [Line(f"finding: {finding['sentence']}") for finding in findings]


def plan_tables(plan: Document) -> Report:
    """Return what memory and time a compression takes: a row a part, the moments in turn."""
    how = "one block at a time" if plan["streamed"] else "the whole network in memory"
    ranks = f", each of {plan['ranks']} ranks" if plan["ranks"] > 1 else ""
    text = f"{plan['checkpoint']}: {plan['parameters']:,} parameters, {plan['tokens']:,} tokens, {how}{ranks}"
    table = FittedTable("moment", "part", "GB", words=("part",))
    for moment, parts in plan["moments"].items():
        for part, size in parts.items():
            table.add_row(moment, part, f"{size / 1e9:.2f}")
        table.add_row(moment, "together", f"{sum(parts.values()) / 1e9:.2f}", bold=True)
    peak = f"peak {plan['peak'] / 1e9:.2f} GB, libraries (0.5 GB) not counted"
    if plan["device_memory"] is not None and plan["unfit"] is None:
        peak += f": {plan['device_memory'] / 1e9:.2f} GB are enough"
    time, durations = plan["time"], FittedTable("part", "minutes")
    for part, seconds in time["parts"].items():
        durations.add_row(part, f"{seconds / 60:,.1f}")
    durations.add_row("together", f"{time['seconds'] / 60:,.1f}", bold=True)
    several = f"; {time['efficiency']:.0%} of what as many times one rank's speed would be" if ranks else ""
    return Report(_title(text), table, Line(peak), durations, Line(f"time of {time['machine']}{several}"))


def _figures_table(networks: Mapping[str, Document], *, entropy: bool = True) -> FittedTable:
    """Return a table with a row a figure, a column a network."""
    table = FittedTable("", *networks)
    first = next(iter(networks.values()))
    for key, (label, factor, form) in figures_of(networks.values()).items():
        if key in first and (entropy or key != "entropy"):
            found = (network.get(key) for network in networks.values())  # averages lack a user's metric
            table.add_row(label, *(_number(None if value is None else factor * value, form) for value in found))
    return table


def _perplexity_table(metrics: Document) -> FittedTable:
    """Return a table with a row a text; the fp32 network's column and the ratio only where they are known."""
    whole = "baseline" in metrics
    columns = ("fp32", "packed file", "ratio") if whole else ("packed file",)
    table = FittedTable("perplexity", *columns, "tokens", "window", "stride")
    for name, packed in metrics["compressed"].items():
        cells = [_number(packed["perplexity"], ".3f")]
        if whole:
            ratio = _number(metrics["perplexity_ratio"][name], ".4f")
            cells = [_number(metrics["baseline"][name]["perplexity"], ".3f"), *cells, ratio]
        table.add_row(name, *cells, *(f"{packed[key]:,}" for key in ("tokens", "window", "stride")))
    return table


def _finish_lines(result: Document) -> list[Line]:
    """Return what the last steps of SVI did, if there were some that were taken."""
    done = result.get("finish")
    if not done:
        return []
    apart = f"{done['before']:.3f} to {done['after']:.3f} nats an example"
    return [Line(f"{done['steps']} last steps: from {apart} away from the original network")]


def _block_table(result: Document) -> FittedTable:
    table = FittedTable("block", "bits a weight", "error", "seconds")
    named = [(str(block["block"]), block) for block in result["blocks"]]
    named += [(each["name"], each) for each in result.get("vocabulary", ())]  # files of earlier releases have none
    for name, part in named:
        table.add_row(name, _number(part["bits"], ".3f"), f"{part['error']:.5f}", f"{part['seconds']:.1f}")
    return table


def _tensor_table(size: Document) -> FittedTable:
    table = FittedTable("tensor", "shape", "layout", "bits", "non-zeros", "%", "bytes", "bits a weight")
    for tensor in size["tensors"]:
        table.add_row(*_tensor_row(tensor))
    table.add_section()
    for part in ("uncompressed", "manifest", "header", "padding"):
        table.add_row(part, "", "", "", "", "", f"{size['parts'][part]:,}", "")
    table.add_row("file", "", "", "", "", "", f"{size['file_bytes']:,}", "", bold=True)
    return table


def bounds_tables(report: Document) -> Report:
    """Return the KL's bracket, estimate and dominant value, by temperature and then by site, in nats a weight."""
    by_temperature = FittedTable("τ", *_KL_COLUMNS, "ELBO from", "to", "± sampling")
    for at in report["temperatures"]:
        elbo = (
            _number(at["elbo_low"], ",.0f"),
            _number(at["elbo_high"], ",.0f"),
            _number(at["nll_error"], ",.0f"),
        )
        by_temperature.add_row(_temperature(at), *_kl_cells(at["total"]), *elbo)
    first = report["temperatures"][0]
    by_site = FittedTable("site", "weights", *_KL_COLUMNS)
    for site in (*first["sites"], first["total"]):
        by_site.add_row(site["name"], f"{site['num_weights']:,}", *_kl_cells(site))
    legend = (
        f"KL in nats a weight, {report['num_samples']} draws of each. ↓: the dominant value is below the KL; "
        "violated: weights whose dominant value is certainly below their KL"
    )
    return Report(Line(legend), by_temperature, _title(f"Sites at τ = {_temperature(first)}"), by_site)


_KL_COLUMNS = ("gates", "lower", "KL ± error", "Jensen", "dominant", "violated, %", "width", "bits")


def _kl_cells(kl: Document) -> list[str]:
    weights = max(kl["num_weights"], 1)  # sites of very different sizes are compared a weight

    def each(key: str, form: str = ".4f") -> str:
        return _number(None if kl[key] is None else kl[key] / weights, form)

    estimate = f"{each('monte_carlo')} ± {each('monte_carlo_error', '.1g')}"
    below = "↓" if dominant_is_below(kl) else ""
    violated = f"{100 * kl['dominant_below'] / weights:.2f}"
    cells = [each("gate_kl"), each("lower"), estimate, each("jensen"), below + each("dominant"), violated]
    return [*cells, each("width"), _number(kl["bits_per_weight"], ".3f")]


def dominant_is_below(kl: Document) -> bool:
    """Return whether the dominant value is below the KL by more than 3 standard errors: there it is no bound."""
    dominant, estimate = kl["dominant"], kl["monte_carlo"]
    return None not in (dominant, estimate) and dominant < estimate - 3 * kl["monte_carlo_error"]


def _temperature(at: Document) -> str:
    return _number(at["temperature"], ".4g")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _tensor_row(tensor: Document) -> list[str]:
    weights = max(math.prod(tensor["shape"]), 1)
    return [
        tensor["name"],
        "×".join(str(side) for side in tensor["shape"]),
        tensor["layout"],
        str(tensor["bits"] or "-"),  # entropy-coded codes have no fixed width
        f"{tensor['nonzeros']:,}",
        f"{100 * tensor['nonzeros'] / weights:.1f}",
        f"{tensor['bytes']:,}",
        f"{8 * tensor['bytes'] / weights:.2f}",
    ]


def _size_table(document: Document, seconds: float | None = None) -> FittedTable:
    size = document["size"]
    table = FittedTable("size", "")
    table.add_row("fp32 network, bytes", f"{size['fp32_bytes']:,}")
    table.add_row("packed file, bytes", f"{size['file_bytes']:,}")
    if size.get("draws", 1) > 1:
        table.add_row("draws in it", str(size["draws"]))
    table.add_row("ratio of the whole file", f"{size['ratio']:.2f}")
    table.add_row("bits a compressed weight", f"{size['bits_per_weight']:.2f}")
    table.add_row("non-zero weights, %", f"{100 * size['nonzero_rate']:.2f}")
    if seconds is not None:
        table.add_row("compression, seconds", f"{seconds:.1f}")
    return table


def _others(size: Document) -> list[Line]:
    """Return what is not compressed: nothing to say of what an older version has measured."""
    if "compressed_share" not in size:
        return []
    largest = ", ".join(f"{each['name']} {each['numel']:,}" for each in size["largest_uncompressed"])
    text = f"{100 * size['compressed_share']:.1f} % of the network's elements are compressed"
    return [Line(f"{text}; the largest others: {largest}" if largest else text)]


def _own_lines(recipe: Document) -> list[Line]:
    """Return what a recipe asks of single layers: what became of them, the tensors' rows say."""
    return [Line(f"asked of layers {pattern}: {said}") for pattern, said in own_settings(recipe).items()]


def _title(text: str) -> Line:
    return Line(text, style="bold")
