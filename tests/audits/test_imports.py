"""The referee stands above both others: neither imports it, and it can be imported."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_nobody_imports_audits_and_they_import():
    importlib.import_module("privfed_audits")
    files = [*(ROOT / "src" / "privfed").rglob("*.py"), *(ROOT / "attacks" / "privfed_attacks").rglob("*.py")]
    assert len(files) > 50
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "privfed_audits" for name in names), file
