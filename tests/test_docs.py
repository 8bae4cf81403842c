"""What the documentation says runs, and what it lists is what there is."""

import ast
import io
import json
import re
import runpy
import shlex
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click
import pyro
import pytest
import typer
import yaml
from kits import forks

from sqs_pyro.cli import app
from sqs_pyro.recipes import parse
from sqs_pyro.runs.images import Images
from sqs_pyro.runs.kinds import kind_of, load_any_recipe
from sqs_pyro.studies.recipe import STUDY_KEYS, StudyRecipe, cells

ROOT = Path(__file__).parent.parent
OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
PAGES = [*OUTSIDE, *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(
    r"(?:<!-- test: (?P<marks>[^\n]*) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S
)
_WIDTH = 80


def _shown(page: Path) -> str:
    return page.relative_to(ROOT).as_posix().removeprefix("docs/")


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Attributes:
        code: indented as in the page's line numbers.
        slow: whether it takes more than a few seconds: ``<!-- test: slow -->`` above it.
        context: what it is meant for, a key of `CONTEXTS`: ``<!-- test: with a transformer -->``.
        prints: what it must have printed: ``<!-- test: prints this; and that -->``. Marks have semicolons between.
    """

    code: str
    slow: bool
    context: str | None
    prints: tuple[str, ...]


def _blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        _block("\n" * text[: match.start("code")].count("\n") + match["code"], match["marks"] or "")
        for match in _BLOCK.finditer(text)
        if match["language"] == language
    ]


def _block(code: str, marks: str) -> Block:
    before, _, printed = marks.partition("prints ")
    words = [mark.strip() for mark in before.split(";") if mark.strip()]
    context = next((word.removeprefix("with ") for word in words if word.startswith("with ")), None)
    assert all(word == "slow" or word.startswith("with ") for word in words), f"unknown mark in {marks!r}"
    return Block(code, "slow" in words, context, tuple(p.strip() for p in printed.split(";") if p.strip()))


def _transformer() -> dict[str, object]:
    """A causal language model, its tokenizer, and calibration text."""
    from kits.language_checkpoint import text, tokenizer
    from kits.tiny_transformers import tiny

    from sqs_pyro.data.tokens import token_sequences

    words = tokenizer()
    sequences = token_sequences(words, text(0), length=24)[:16]
    return {"net": tiny("llama", vocab_size=len(words)), "sequences": sequences, "tokenizer": words}


#: What a block that is no whole program by itself finds there, by the words of its mark.
CONTEXTS = {"a transformer": _transformer}


def _run_blocks(page: Path, *, slow: bool, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a page's python blocks in one namespace, on a terminal of 80 columns; slow ones only if asked for."""
    monkeypatch.chdir(directory)
    monkeypatch.setenv("COLUMNS", str(_WIDTH))
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for block in _blocks(page, "python"):
        if slow or not block.slow:
            namespace |= CONTEXTS[block.context]() if block.context is not None else {}
            printed = io.StringIO()
            with redirect_stdout(printed):
                exec(compile(block.code, str(page), "exec"), namespace)
            _check_printed(printed.getvalue(), block)


def _check_printed(shown: str, block: Block) -> None:
    """What is promised is there, reports fit the terminal, and nothing shows its address."""
    assert "object at 0x" not in shown
    for words in block.prints:
        assert words in " ".join(shown.split()), f"{words!r} is not in what was printed:\n{shown}"
    if block.prints:
        assert max(map(len, shown.splitlines())) <= _WIDTH


def _pages(*, slow: bool) -> list[Path]:
    return [page for page in PAGES if any(block.slow == slow for block in _blocks(page, "python"))]


@pytest.mark.parametrize("page", _pages(slow=False), ids=_shown)
def test_python_blocks_run(page, tmp_path, monkeypatch, blank_pictures):
    _run_blocks(page, slow=False, directory=tmp_path, monkeypatch=monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("page", _pages(slow=True), ids=_shown)
def test_slow_python_blocks_run(page, tmp_path, monkeypatch):
    _run_blocks(page, slow=True, directory=tmp_path, monkeypatch=monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=_shown)
def test_python_is_in_blocks_that_run(page):
    """Not indented in the text, where nobody tries it."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    assert not re.findall(r"^    (?:import |from \w+ import |\w+ = \w+[.(]|print\()", text, re.M)


@pytest.mark.parametrize("page", [page for page in PAGES if "print(report)" in page.read_text()], ids=_shown)
def test_a_printed_report_is_checked_for_its_text(page):
    for block in _blocks(page, "python"):
        assert "print(report)" not in block.code or block.prints


@pytest.mark.parametrize("page", PAGES, ids=_shown)
def test_every_code_block_is_of_a_language_that_is_tested(page):
    fences = re.findall(r"^```(\S+)$", page.read_text(encoding="utf-8"), re.M)
    assert len(fences) == sum(len(_blocks(page, language)) for language in ("python", "yaml", "json", "text"))


@pytest.mark.parametrize("page", PAGES, ids=_shown)
def test_yaml_blocks_are_recipes(page):
    for block in _blocks(page, "yaml"):
        rest = {"network": {"name": "digits_net"}, "data": {"name": "digits"}}  # a block may show one section
        values = yaml.safe_load(block.code)
        if _is_study(values):
            cells(parse(StudyRecipe, {"name": "shown", **values, "base": {**rest, **values.get("base", {})}}))
        else:
            kind = kind_of(values)
            kind.parse({**rest, **values} if isinstance(kind, Images) else values)


@pytest.mark.parametrize("page", PAGES, ids=_shown)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


@cache
def _names(module: Path) -> set[str]:
    """Functions, classes and ``Class.method`` of a file, and the file's own name."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    named = (ast.FunctionDef, ast.ClassDef)
    top = [node for node in tree.body if isinstance(node, named)]
    inner = [(c.name, node.name) for c in top for node in getattr(c, "body", ()) if isinstance(node, named)]
    return {module.stem, *(node.name for node in top), *(f"{outer}.{name}" for outer, name in inner)}


@pytest.mark.parametrize("page", PAGES, ids=_shown)
def test_code_that_is_linked_by_name_is_there(page):
    """``[`name`](file.py)``: a function, class, method or test of that file, arguments left out."""
    for label, target in re.findall(r"\[`([\w.]+)[^`]*`\]\(([^)#\s]+\.py)\)", page.read_text(encoding="utf-8")):
        assert label.removeprefix("sqs_pyro.") in _names((page.parent / target).resolve()), f"{label} in {target}"


def test_the_house_names_every_room_and_each_step_of_its_walks_a_function():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms, *walks = page.split("\n## ")
    for room in (ROOT / "sqs_pyro").iterdir():
        assert not (room / "__init__.py").exists() or f"`{room.name}`" in rooms, room.name
    assert [walk.splitlines()[0].split(",")[0] for walk in walks] == ["A weight", "A recipe"]
    for walk in walks:
        steps = re.split(r"\n\d+\. ", walk)[1:]
        assert len(steps) >= 8 and all(re.search(r"\[`\w[\w.]+`\]\(\.\./sqs_pyro/", step) for step in steps)


def test_every_row_of_formulas_has_a_function_and_a_test():
    section = (ROOT / "docs" / "method.md").read_text(encoding="utf-8").split("## Formulas, functions, tests")[1]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for _, functions, tests in rows:
        assert "](../sqs_pyro/" in functions and ("](../tests/" in tests or "](../sqs_pyro/testing/" in tests)


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


def test_every_benchmark_is_in_the_index_with_its_command():
    index = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "benchmarks").iterdir()):
        assert path.name in ("README.md", "__pycache__") or f"]({path.name})" in index, path.name
    for path in sorted((ROOT / "benchmarks").glob("*.json")):
        command = json.loads(path.read_text(encoding="utf-8"))["command"]
        program, first, *_ = command.split()
        assert program == "sqs" or (program == "python" and (ROOT / first).is_file()), command
        row = next(line for line in index.splitlines() if f"]({path.name})" in line)
        assert f"`{command}`" in row or "in the JSON" in row


def test_scripts_write_the_command_that_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/draws.py", "--repeats", "3"])
    figures = runpy.run_path(str(ROOT / "benchmarks" / "figures.py"))
    figures["write_figures"](tmp_path / "draws.json", {"samples": 10})
    written = json.loads((tmp_path / "draws.json").read_text())
    assert written == {"command": "python benchmarks/draws.py --repeats 3", "samples": 10}
    writers = [path.name for path in (ROOT / "benchmarks").glob("*.py") if "write_text(json" in path.read_text()]
    assert writers == ["figures.py"]  # every script writes by it


def test_every_recipe_has_a_goal():
    goals = (ROOT / "docs" / "goals.md").read_text(encoding="utf-8")
    assert all(f"](../recipes/{recipe.name})" in goals for recipe in (ROOT / "recipes").glob("*.yaml"))


def test_readme_is_short_and_in_order():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    places = [readme.index(heading) for heading in ("\n## Install", "\n## Use", "\n## Pictures", "\n## Measured")]
    assert places == sorted(places)


def test_pages_are_in_the_navigation():
    """Each once; `make docs` checks links and anchors."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    for page in (ROOT / "docs").glob("*.md"):
        assert navigation.count(f": {page.name}\n") == 1, page.name


def _documented(function: ast.FunctionDef | ast.ClassDef) -> set[str]:
    """Names under ``Args:`` of a docstring; several may share a line."""
    _, _, below = (ast.get_docstring(function) or "").partition("Args:\n")
    section = re.split(r"\n\n(?=\S)|\n(?=\S)", below)[0]
    heads = re.findall(r"^ {4}([*\w]+(?:, [*\w]+)*):", section, re.M)
    return {name.strip("*") for head in heads for name in head.split(", ")}


def test_documented_arguments_are_those_of_the_signature():
    """A misspelt or forgotten one would be on the site, too; `docs/` has no other check of it."""
    for module in sorted((ROOT / "sqs_pyro").rglob("*.py")):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args
                every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
                names = {a.arg for a in (*every, arguments.vararg, arguments.kwarg) if a is not None}
                assert _documented(node) <= names, f"{module.name}: {node.name}"


def _commands() -> list[str]:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    return sorted(set(re.findall(r"^    sqs (\w+ [^\n]*?)(?:  .*)?$", text, re.M)))


@pytest.mark.parametrize("command", _commands())
def test_commands_are_taken_as_they_stand(command):
    """Every option exists and has a value of its kind, nothing is missing; what it names need not be there."""
    words = shlex.split(command, comments=True)
    group = typer.main.get_command(app)
    while isinstance(group, click.Group):
        name = words.pop(0)
        assert name in group.commands, f"there is no command {name}"
        group = group.commands[name]
    if "..." not in words:
        group.make_context(group.name, [word for word in words if word not in ("[OPTIONS]",)])


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
    script = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    checked = forks.run(script, ROOT / "docs" / "reference.py", "--check")
    assert checked.returncode == 0, f"run `python docs/reference.py`\n{checked.stderr}"
