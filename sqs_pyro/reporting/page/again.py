"""What makes a run again: commands, recipe, versions, machine, and where the time went."""

from collections.abc import Sequence

from sqs_pyro.reporting.page.markup import Child, Markup, element
from sqs_pyro.reporting.page.numbers import short_time
from sqs_pyro.reporting.page.plain import Document
from sqs_pyro.reporting.page.table import pairs, table


def again(run: Document) -> list[Markup]:
    """Return the commands of a run, its recipe, and what its figures depend on."""
    metrics, text = run["metrics"], run.get("recipe_text")
    commands = [
        "sqs compress recipe.yaml --out ../again",
        "sqs evaluate .",
        "sqs inspect .",
        "sqs report .",
    ]
    whole = element(
        "details", element("summary", "recipe.yaml, all defaults filled in"), element("pre", text, tabindex="0")
    )
    return [
        element("p", "In the directory of this run:"),
        command_lines(commands if text else commands[1:]),
        *([whole] if text else []),
        element("div", depends_on(metrics), _stages(metrics), class_="columns"),
    ]


def command_lines(commands: Sequence[str]) -> Markup:
    """Return commands, each behind a button that copies it."""
    button = element("button", "Copy", type="button", class_="copy")
    return element(
        "ul", [element("li", element("code", command), " ", button) for command in commands], class_="commands"
    )


def depends_on(document: Document) -> list[Markup]:
    """Return versions, and the machine where it is known."""
    rows: list[tuple[Child, ...]] = [
        (name, str(value)) for name, value in (document.get("versions") or {}).items()
    ]
    machine = document.get("machine") or {}
    for name, value in machine.items():
        if name not in ("torch", "python"):
            rows.append((name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return [pairs("Versions and machine", rows)] if rows else []


def _stages(metrics: Document) -> list[Markup]:
    seconds = metrics.get("stage_seconds") or {}
    rows: list[list[Child]] = [
        [name.replace("_", " "), short_time(value)] for name, value in seconds.items() if value
    ]
    return [table("Where the time went", ["stage", "time"], rows)] if rows else []


def findings(found: Sequence[Document]) -> Markup:
    """Return what is wrong with a posterior, each with its repair, or that nothing was found."""
    if not found:
        return element("p", "Nothing: the posterior passed every check of the diagnostics.")
    items = []
    for finding in found:
        # A sentence says what was found and, behind the last semicolon, what repairs it.
        said, semicolon, repair = str(finding["sentence"]).rpartition("; ")
        where = [element("strong", str(finding.get("site") or "the whole network")), " "]
        items.append(element("li", where, said + ". " if semicolon else "", element("span", _begun(repair))))
    return element("ul", items, class_="findings")


def _begun(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
