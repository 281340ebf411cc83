"""Print the lowest versions of torch, transformers and peft that the metadata allows, as pip takes them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

NAMES = ("torch", "transformers", "peft")


def lowest() -> dict[str, str]:
    """Return {package: lowest version} from pyproject.toml."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    found = {}
    for line in tomllib.loads(text)["project"]["dependencies"]:
        match = re.fullmatch(r"([\w-]+)>=([\d.]+).*", line)
        if match and match[1] in NAMES:
            found[match[1]] = match[2]
    return found


if __name__ == "__main__":
    print(" ".join(f"{name}=={version}" for name, version in lowest().items()))
