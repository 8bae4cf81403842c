"""Text for streams that cannot hold every character: what is missing there gets a plain replacement."""

import unicodedata

_PLAIN = {  # of what tables and sentences use; other characters lose their accents or become a question mark
    "±": "+-",
    "×": "x",
    "·": "*",
    "→": "->",
    "↓": "v",
    "≤": "<=",
    "≥": ">=",
    "…": "...",
    "–": "-",
    "—": "-",
    "−": "-",
    "’": "'",
    "½": "1/2",
    "µ": "u",
    "μ": "mu",
    "σ": "sigma",
    "λ": "lambda",
    "τ": "tau",
    "φ": "phi",
    "π": "pi",
    "ρ": "rho",
    "β": "beta",
    "θ": "theta",
    "₀": "0",
}


def written(text: str, encoding: str) -> str:
    """Replace every character that ``encoding`` lacks, ``±`` by ``+-``, ``λ`` by ``lambda``."""
    if _holds(encoding, text):
        return text
    return "".join(each if _holds(encoding, each) else _replacement(each, encoding) for each in text)


def _replacement(character: str, encoding: str) -> str:
    plain = _PLAIN.get(character) or unicodedata.normalize("NFKD", character)
    # NFKD parts a letter from its accent, which is then left out.
    return plain.encode(encoding, "ignore").decode(encoding) or "?"


def _holds(encoding: str, text: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
