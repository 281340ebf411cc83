"""What tests of curves share: a grid's folder with made-up results, and a grid of seconds that really trains."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomli_w


def _load(name: str, path: Path) -> ModuleType:
    """Import a file from its path: the tests are not a package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_shared = _load("privfed_fixtures_of_curves", Path(__file__).parents[2] / "privfed" / "conftest.py")
tiny_bert, text_csv = _shared.tiny_bert, _shared.text_csv


@pytest.fixture(scope="session")
def made() -> ModuleType:
    """The module that makes up results."""
    return _load("privfed_made_curves", Path(__file__).with_name("made.py"))


@pytest.fixture(scope="session")
def results(made: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The results of a whole made-up grid."""
    grid = made.grid()
    return made.read(made.write(tmp_path_factory.mktemp("made") / "grid", grid), grid)


# steps that move every tensor of so small a model, without noise to help
NO_PRIVACY = [
    "privacy.unit=none",
    "privacy.target_epsilon=unset",
    "client.optimizer=adamw",
    "client.learning_rate=0.01",
]


@pytest.fixture
def small_grid(tiny_bert: Path, text_csv: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return ``small_grid(**changes)``: the file of a grid of eight cells, two of them refused, seconds each."""

    def write(**changes: Any) -> Path:
        base = {
            "model": {"name": str(tiny_bert), "max_length": 24},
            "data": {"path": str(text_csv), "client": "client"},
            "partition": {"name": "iid", "clients": 4},
            "client": {"optimizer": "sgd", "learning_rate": 0.5, "sampling_probability": 0.2, "local_steps": 1},
            "server": {"rounds": 2, "evaluate_every": 2},
            "privacy": {"target_epsilon": 8.0, "target_delta": 1e-4, "reproducible_noise": True},
        }
        (tmp_path / "base.toml").write_text(tomli_w.dumps(base))
        grid: dict[str, Any] = {
            "base": str(tmp_path / "base.toml"),
            "audit": False,
            "tuning": {"LoRA": ["tuning.name=lora", "tuning.r=2"], "head": ["tuning.name=head"]},
            "codec": {"float32": ["compression.name=identity"], "top": ["compression.name=top_k"]},
            "privacy": {
                "none": NO_PRIVACY,
                "epsilon 8": ["privacy.target_epsilon=8.0"],
            },
            **changes,
        }
        path = tmp_path / "grid.toml"
        path.write_text(tomli_w.dumps(grid))
        return path

    return write
