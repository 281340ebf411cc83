"""The direction of imports, and what questions that need no model must not load."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "src" / "privfed"
HEAVY = ("torch", "transformers", "peft", "opacus", "datasets", "matplotlib", "sklearn")


def loaded_by(statement):
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "import privfed.config",
        "import privfed.budget",
        "import privfed.catalogue; privfed.catalogue.catalogue(None)",
        "import privfed.config; privfed.config.load_config('tiny').to_toml()",
        "import privfed.privacy.plan, privfed.privacy.ledger, privfed.ledger_view",
    ],
)
def test_questions_without_a_model_load_no_model_library(statement):
    assert not loaded_by(statement) & set(HEAVY)


def test_the_check_can_tell():
    assert "torch" in loaded_by("import privfed.federation.local")


def test_the_bare_package_and_its_help_load_next_to_nothing():
    assert not loaded_by("import privfed") & {*HEAVY, "numpy", "pydantic", "click"}
    help_ = "from privfed.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    found = loaded_by(help_)
    assert "click" in found
    assert not found & {*HEAVY, "pydantic", "numpy", "scipy", "dp_accounting", "rich"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_the_trusted_code_imports_no_attack_and_no_audit():
    files = list(SOURCES.rglob("*.py"))
    assert len(files) > 50
    outside = {
        (f.name, m) for f in files for m in imported(f) if m.split(".")[0] in ("privfed_attacks", "privfed_audits")
    }
    # the one exception: the command line may start an audit
    assert all(name == "cli.py" and module.startswith("privfed_audits") for name, module in outside)


LAYERS = [
    "errors",
    "rng registry table",
    "types",
    "models data tuning privacy compression secagg",
    "config",
    "federation",
]


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_a_layer_imports_nothing_from_above_it(layer):
    above = {f"privfed.{name}" for names in LAYERS[layer + 1 :] for name in names.split()}
    above |= {"privfed.cli", "privfed.run", "privfed.report"}
    for name in LAYERS[layer].split():
        files = [SOURCES / f"{name}.py"] if (SOURCES / f"{name}.py").exists() else (SOURCES / name).rglob("*.py")
        for file in files:
            wrong = [m for m in imported(file) if any(m == a or m.startswith(f"{a}.") for a in above)]
            assert not wrong, f"{file} imports {wrong}"
