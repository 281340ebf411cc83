"""The tiny models, data and runs that tests of the audits share with those of the package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_PATH = Path(__file__).parents[1] / "privfed" / "conftest.py"
_spec = importlib.util.spec_from_file_location("privfed_fixtures_of_all_audits", _PATH)
assert _spec is not None and _spec.loader is not None
_shared = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _shared
_spec.loader.exec_module(_shared)

tiny_bert = _shared.tiny_bert
tiny_gpt2 = _shared.tiny_gpt2
text_csv = _shared.text_csv
tiny_config = _shared.tiny_config
