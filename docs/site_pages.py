"""The pages of the site that are not in docs/: a hook of mkdocs, which `make docs` runs.

README and its like become pages, every room of the library gets one of its docstrings, every example one of its
text and code, and a file of the repository that a page links to is copied into the site, so that each link is one
that mkdocs checks.
"""

import ast
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
#: Markdown elsewhere in the repository, and its page.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
#: Programs of a page each.
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)#\s:]+)(?=[)#])")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in the navigation of examples and API."""
    section = next(entry for entry in config.nav or () if "Examples" in entry)
    section["Examples"] = [f"examples/{path.stem}.md" for path in EXAMPLES]
    section = next(entry for entry in config.nav or () if "API" in entry)
    section["API"] = [{"sqs_pyro": "api/index.md"}, *({room: f"api/{room}.md"} for room in rooms())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, the examples and those of the API."""
    for path, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    for path in EXAMPLES:
        files.append(File.generated(config, f"examples/{path.stem}.md", content=example_page(path)))
    hall = "# sqs_pyro\n\n::: sqs_pyro\n    options: {members_order: __all__}\n"
    files.append(File.generated(config, "api/index.md", content=hall + _modules(ROOT / "sqs_pyro", "*.py")))
    for room in rooms():
        page = f"# sqs_pyro.{room}\n\n" + _modules(ROOT / "sqs_pyro" / room, "**/*.py")
        files.append(File.generated(config, f"api/{room}.md", content=page))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to the repository's files lead to their pages or copies in the site."""
    outside = {uri: path for path, uri in OUTSIDE.items()}
    source = ROOT / outside.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def in_site(link: re.Match[str]) -> str:
        target = (source.parent / link["path"]).resolve()
        if not (target.is_file() and target.is_relative_to(ROOT)):
            return link["path"]  # mkdocs says what is wrong with it
        uri = _uri(target.relative_to(ROOT).as_posix())
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(target)))
        up = "../" * (len(PurePosixPath(page.file.src_uri).parts) - 1)
        return up + uri

    return _LINK.sub(in_site, markdown)


def example_page(path: Path) -> str:
    """Return an example as a page: its first sentence for a heading, what else it says, and its code."""
    source = path.read_text(encoding="utf-8")
    heading, _, text = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")
    code = source.split('"""', 2)[2].strip()  # a docstring has no such quotes in it
    return f"# {heading.rstrip('.')}\n\n{text}\n\n```python\n{code}\n```\n"


def rooms() -> list[str]:
    """Return the packages below sqs_pyro."""
    return sorted(path.parent.name for path in (ROOT / "sqs_pyro").glob("*/__init__.py"))


def _uri(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    if ROOT / path in EXAMPLES:
        return str(PurePosixPath(path).with_suffix(".md"))
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}"


def _modules(directory: Path, pattern: str) -> str:
    """The docstrings of a room's modules, but for private ones and faces that only import."""
    paths = sorted(path.relative_to(ROOT).with_suffix("") for path in directory.glob(pattern))
    return "\n".join(f"::: {'.'.join(p.parts)}\n" for p in paths if not p.name.startswith("_"))
