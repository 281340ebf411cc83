"""``privfed ls attacks``: every attack there is and what it needs, from the registries."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from privfed_attacks.inversion import ATTACKS
from privfed_attacks.membership import MEMBERSHIP


def attacks() -> dict[str, str]:
    """Return one line an attack: first those that look for data, then those that ask who was in it."""
    found = {name: f"{_title(each.run)} Finds {each.reads}; {each.server} server." for name, each in ATTACKS.items()}
    for name, entry in MEMBERSHIP.items():
        found[name] = f"{_title(entry.function)} Membership, from {', '.join(map(_words, entry.needs))}."
    return found


def _title(function: Any) -> str:
    """Return the first line of the file that an attack is, as a sentence."""
    doc = importlib.import_module(inspect.unwrap(function).__module__).__doc__ or ""
    line = " ".join(doc.strip().partition("\n\n")[0].split())
    return line if line.endswith((".", "?")) else f"{line}."


def _words(field: str) -> str:
    """Return the name of a field of evidence without its letters for shapes."""
    return re.sub(r"_[A-Z]+$", "", field).replace("_", " ")
