"""Run folders for the report's tests, one of each kind, written once."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load() -> ModuleType:
    """Import ``folders.py`` from beside this file: the tests are not a package."""
    spec = importlib.util.spec_from_file_location("privfed_report_folders", Path(__file__).with_name("folders.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def folders() -> ModuleType:
    """The module that makes up run folders."""
    return _load()


@pytest.fixture(scope="session")
def runs(folders: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind of run: local, central, none, reproducible, unfinished; each with its report."""
    from privfed.report.html import write_report

    root = tmp_path_factory.mktemp("runs")
    many = tuple(f"category {i}" for i in range(24))
    found = {
        "local": folders.write_run(root / "local", folders.facts()),
        "central": folders.write_run(
            root / "central", folders.central(), unit="client", epsilon=3.2, clients=200, labels=many
        ),
        "none": folders.write_run(root / "none", folders.no_privacy(), unit="none"),
        "reproducible": folders.write_run(
            root / "reproducible", folders.facts(noise_source="reproducible"), noise="reproducible"
        ),
        "unfinished": folders.write_run(root / "unfinished", None, rounds=4),
    }
    for folder in found.values():
        write_report(folder)
    return found
