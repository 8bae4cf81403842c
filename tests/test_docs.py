"""What the documentation says runs, and what it lists is what there is."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import yaml
from typer.testing import CliRunner

from sqs_pyro.cli import app
from sqs_pyro.recipe import parse
from sqs_pyro.runs.language_model_recipe import LanguageModelRecipe, is_language_model, load_any_recipe
from sqs_pyro.runs.recipe import RunRecipe
from sqs_pyro.runs.study_recipe import STUDY_KEYS, StudyRecipe, cells

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(?P<slow><!-- test: slow -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


def _blocks(page: Path, language: str) -> list[tuple[str, bool]]:
    """Code blocks of a page, indented as in the page's line numbers, and whether each is marked slow."""
    text = page.read_text(encoding="utf-8")
    return [
        ("\n" * text[: match.start("code")].count("\n") + match["code"], match["slow"] is not None)
        for match in _BLOCK.finditer(text)
        if match["language"] == language
    ]


def _run_blocks(page: Path, *, slow: bool, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a page's python blocks in one namespace; slow ones only if asked for."""
    monkeypatch.chdir(directory)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for code, is_slow in _blocks(page, "python"):
        if slow or not is_slow:
            exec(compile(code, str(page), "exec"), namespace)


def _pages(*, slow: bool) -> list[Path]:
    return [page for page in PAGES if any(is_slow == slow for _, is_slow in _blocks(page, "python"))]


@pytest.mark.parametrize("page", _pages(slow=False), ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    _run_blocks(page, slow=False, directory=tmp_path, monkeypatch=monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("page", _pages(slow=True), ids=lambda page: page.name)
def test_slow_python_blocks_run(page, tmp_path, monkeypatch):
    _run_blocks(page, slow=True, directory=tmp_path, monkeypatch=monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_code_block_is_of_a_language_that_is_tested(page):
    fences = re.findall(r"^```(\S+)$", page.read_text(encoding="utf-8"), re.M)
    assert len(fences) == sum(len(_blocks(page, language)) for language in ("python", "yaml", "json", "text"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_blocks_are_recipes(page):
    for code, _ in _blocks(page, "yaml"):
        rest = {"network": {"name": "digits_net"}, "data": {"name": "digits"}}  # a block may show one section
        values = yaml.safe_load(code)
        if _is_study(values):
            cells(parse(StudyRecipe, {"name": "shown", **values, "base": {**rest, **values.get("base", {})}}))
        elif is_language_model(values):
            parse(LanguageModelRecipe, values)
        else:
            parse(RunRecipe, {**rest, **values})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def _names(module: Path) -> set[str]:
    """Functions, classes and ``Class.method`` of a file, and the file's own name."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    named = (ast.FunctionDef, ast.ClassDef)
    top = [node for node in tree.body if isinstance(node, named)]
    inner = [(c.name, node.name) for c in top for node in getattr(c, "body", ()) if isinstance(node, named)]
    return {module.stem, *(node.name for node in top), *(f"{outer}.{name}" for outer, name in inner)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_that_is_linked_by_name_is_there(page):
    """``[`name`](file.py)``: a function, class, method or test of that file, arguments left out."""
    for label, target in re.findall(r"\[`([\w.]+)[^`]*`\]\(([^)#\s]+\.py)\)", page.read_text(encoding="utf-8")):
        assert label.removeprefix("sqs_pyro.") in _names(page.parent / target), f"{label} in {target}"


def test_every_row_of_formulas_has_a_function_and_a_test():
    section = (ROOT / "docs" / "method.md").read_text(encoding="utf-8").split("## Formulas, functions, tests")[1]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for _, functions, tests in rows:
        assert "](../sqs_pyro/" in functions and "](../tests/" in tests


def test_bounds_on_the_method_page_are_those_measured():
    """Every row of its table, from the JSON that `benchmarks/bounds.py` wrote."""
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    report = json.loads((ROOT / "benchmarks" / "bounds.json").read_text())
    assert f"recipes/{report['recipe']} --set {report['changes'][0]}" in page
    for at in report["temperatures"]:
        total, weights = at["total"], at["total"]["num_weights"]
        keys = ("lower", "monte_carlo", "jensen", "dominant")
        lower, kl, jensen, dominant = (f"{total[key] / weights:.4f}" for key in keys)
        error, width = total["monte_carlo_error"] / weights, 100 * total["width"] / total["monte_carlo"]
        cells = [f"{at['temperature']:g}", lower, f"{kl} ± {error:.4f}", jensen, dominant, f"{width:.1f} %"]
        assert f"| {' | '.join(cells)} | {total['dominant_below']} |" in page
        assert all(site["dominant"] > site["monte_carlo"] - 5 * site["monte_carlo_error"] for site in at["sites"])


def _commands() -> list[str]:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    return sorted(set(re.findall(r"^    sqs (\w+ [^\n]*?)(?:  .*)?$", text, re.M)))


@pytest.mark.parametrize("command", _commands())
def test_commands_and_their_options_exist(command):
    name, *words = shlex.split(command, comments=True)
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    for option in (word for word in words if word.startswith("--")):
        assert option in shown.output


def _is_study(values: dict[str, object]) -> bool:
    return bool(STUDY_KEYS & set(values))


def _recipes_of_runs() -> list[Path]:
    """Studies have a test beside the code that reads them."""
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    return [recipe for recipe in recipes if not _is_study(yaml.safe_load(recipe.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("recipe", _recipes_of_runs(), ids=lambda recipe: recipe.name)
def test_recipes_are_valid(recipe):
    loaded = load_any_recipe(recipe)
    assert parse(type(loaded), yaml.safe_load(loaded.as_yaml())) == loaded


def test_the_recipe_page_says_what_the_recipe_classes_say():
    # In a process of its own: other tests register networks.
    command = [sys.executable, ROOT / "docs" / "reference.py", "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run `python docs/reference.py`"
