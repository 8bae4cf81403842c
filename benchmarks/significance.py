"""Which differences that README and pages claim are beyond chance?

Tests the claims of ``claims.py`` by the committed figures; ``claim.py`` says how. Holm's p is that of all tests of
figures in the same file.

    python benchmarks/significance.py

writes ``significance.json`` and the table of docs/claims.md. A file, key or sentence that is gone ends it.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from claim import HERE, Claim, Found, at, document
from claims import CLAIMS
from figures import write_figures

from sqs_pyro.reporting.paired import holm

ROOT = HERE.parent
PAGE = ROOT / "docs" / "claims.md"
_TABLE_BEGINS = "<!-- written by benchmarks/significance.py -->"


def rows() -> list[dict[str, Any]]:
    """Test all claims.

    Raises:
        SystemExit: a file, a key or a page's sentence is gone.
    """
    for claim in CLAIMS:
        for page, sentence in claim.says.items():
            if sentence not in _text(page):
                raise SystemExit(f"{page} no longer says {sentence!r}: {claim.what}.")
    found = [_tested(claim) for claim in CLAIMS]
    p_holm: dict[int, float] = {}
    for file in {claim.ours[0] for claim in CLAIMS}:
        p = {i: said.p for i, said in enumerate(found) if said.p is not None and CLAIMS[i].ours[0] == file}
        p_holm |= dict(zip(p, holm(list(p.values())), strict=True))
    return [_row(claim, said, p_holm.get(i)) for i, (claim, said) in enumerate(zip(CLAIMS, found, strict=True))]


def _tested(claim: Claim) -> Found:
    theirs = at(claim.theirs) if isinstance(claim.theirs, tuple) else claim.theirs
    return claim.test(at(claim.ours), theirs, document(claim.ours[0]))


@cache
def _text(page: str) -> str:
    return " ".join(page_of(page).read_text(encoding="utf-8").split())


def page_of(name: str) -> Path:
    return ROOT / name if name == "README.md" else ROOT / "docs" / name


def _row(claim: Claim, found: Found, p_holm: float | None) -> dict[str, Any]:
    return {
        "says": claim.says,
        "what": claim.what,
        "file": claim.ours[0],
        "n": found.n,
        "of": found.of,
        "difference": claim.scale * found.difference,
        "unit": claim.unit,
        "interval": None if found.interval is None else [claim.scale * end for end in found.interval],
        "p": found.p,
        "p_holm": p_holm,
        "verdict": verdict(claim, found, p_holm),
    }


def verdict(claim: Claim, found: Found, p_holm: float | None) -> str:
    if found.p is None or p_holm is None:
        return found.of if found.n is None else "one run" if found.n == 1 else f"{found.n} {found.of}"
    if found.p >= 0.05:
        return "not shown" if claim.claimed else "no difference shown"
    # Of times as fast the middle is 1.
    more = found.difference > (1 if claim.unit == "times" else 0)
    if claim.claimed != (1 if more else -1):
        return "contradicted"
    return "holds" if p_holm < 0.05 else "holds alone"


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| page | ours less theirs, or over | n | difference, 95 % interval | p | p, Holm | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        page = next(iter(row["says"]))
        link = f"[{page}]({'../README.md' if page == 'README.md' else page})"
        n = row["of"] if row["n"] is None else f"{row['n']:,} {row['of']}"
        shown = _number(row["difference"], row["unit"] != "times")
        if row["interval"] is not None:
            low, high = (_number(end, row["unit"] != "times") for end in row["interval"])
            shown += f" ({low} to {high})"
        shown += f" {row['unit']}" if row["unit"] else ""
        p, p_holm = ("" if row[key] is None else _probability(row[key]) for key in ("p", "p_holm"))
        lines.append(f"| {link} | {row['what']} | {n} | {shown} | {p} | {p_holm} | {row['verdict']} |")
    return "\n".join(lines) + "\n"


def _number(value: float, signed: bool) -> str:
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:{'+' if signed else ''}.{min(digits, 4)}f}"


def _probability(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def with_table(page: str, table: str) -> str:
    """The page with this table in place of what is behind the mark."""
    before, mark, _ = page.partition(_TABLE_BEGINS)
    if not mark:
        raise SystemExit(f"{PAGE} has no line '{_TABLE_BEGINS}'.")
    return f"{before}{mark}\n\n{table}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    found = rows()
    write_figures(Path(__file__).with_suffix(".json"), {"rows": found})
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), markdown(found)), encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
