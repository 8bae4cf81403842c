"""The page of one run: of images, of other tasks, of text, or of a language model."""

from sqs_pyro.reporting.page.again import again, findings
from sqs_pyro.reporting.page.bracket import bracket
from sqs_pyro.reporting.page.calibration import calibration
from sqs_pyro.reporting.page.document import Section, document
from sqs_pyro.reporting.page.glance import asked, glance
from sqs_pyro.reporting.page.layer_table import blocks, layers
from sqs_pyro.reporting.page.markup import element
from sqs_pyro.reporting.page.plain import Document, is_language_model
from sqs_pyro.reporting.page.quality import latency, quality, search
from sqs_pyro.reporting.page.sizes import sizes
from sqs_pyro.reporting.page.training import training


def run_page(run: Document) -> str:
    """Return the page of a run.

    Args:
        run: ``metrics`` and, where there are such, ``bounds``, ``recipe`` (as plain data), ``recipe_text``,
            ``history`` (rows of ``history.csv``) and ``layers`` (of
            :func:`~sqs_pyro.reporting.layers.layer_document`).
    """
    metrics = run["metrics"]
    recipe: Document = run.get("recipe") or {}
    times, reliability, bounds = latency(metrics), metrics.get("reliability"), run.get("bounds")
    kind = "language model" if is_language_model(metrics) else str(metrics.get("task") or "network")
    found = metrics.get("findings") or ()
    sections = [
        Section(
            "asked", "Asked and got", element("div", asked(metrics, recipe), quality(metrics), class_="columns")
        ),
        Section("search", "Sizes that were tried", search(metrics)) if metrics.get("search") else None,
        Section("latency", "Latency", times) if times else None,
        Section("findings", "Findings", findings(found)),
        Section("bytes", "Where the bytes are", sizes(metrics)),
        Section("tensors", "Layers", layers(metrics["size"], run.get("layers") or ())),
        Section("blocks", "Blocks", blocks(metrics["blocks"])) if metrics.get("blocks") else None,
        Section("training", "Training", training(run["history"])) if run.get("history") else None,
        Section("calibration", "Calibration", calibration(reliability)) if reliability else None,
        Section("bounds", "ELBO and its bracket", bracket(bounds)) if bounds else None,
        Section("again", "Make it again", again(run)),
    ]
    title = str(metrics.get("name") or "run")
    subtitle = f"A compressed {kind}, seed {metrics['seed']}"
    return document(title, subtitle, glance(metrics, recipe), sections)
