"""Imports ``noise_checks.py`` from beside this file (the tests are not a package) under a name of its own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("privfed_noise_checks", Path(__file__).with_name("noise_checks.py"))
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _module
_spec.loader.exec_module(_module)
