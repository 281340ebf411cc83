"""``privfed_audits.audit`` and ``privfed_audits.curves``: the command line's own functions, from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import privfed_audits
from privfed.errors import ConfigError
from privfed_audits.grids.grid import load_grid

HEAVY = {"torch", "transformers", "peft", "matplotlib", "plotly", "numpy"}


def test_the_package_hands_out_two_functions_and_loads_next_to_nothing() -> None:
    code = "import sys, json, privfed_audits; dir(privfed_audits); print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))
    assert not loaded & HEAVY
    assert {"audit", "curves"} <= set(dir(privfed_audits))
    with pytest.raises(AttributeError, match="no attribute 'adit'"):
        privfed_audits.adit  # noqa: B018


def test_the_names_stay_functions_when_their_modules_are_loaded() -> None:
    import privfed_audits.auditing
    import privfed_audits.grids.command

    assert callable(privfed_audits.audit) and privfed_audits.audit is not privfed_audits.auditing.audit
    assert callable(privfed_audits.curves) and privfed_audits.curves is not privfed_audits.grids.command.curves


def test_an_audit_of_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no run in"):
        privfed_audits.audit(tmp_path)


def test_a_grid_may_be_tables(tmp_path: Path) -> None:
    tables = {"base": "tiny", "codec": {"plain": ["compression.name=identity"]}}
    grid = load_grid(tables, ["server.rounds=2"])
    assert (grid.base, list(grid.codec), grid.settings) == ("tiny", ["plain"], ["server.rounds=2"])
    path = tmp_path / "grid.toml"
    path.write_text(grid.to_toml(), encoding="utf-8")
    assert load_grid(str(path)) == grid
    with pytest.raises(ConfigError, match="grid: Unknown key 'codecs' of a grid"):
        privfed_audits.curves({"codecs": {}}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
