"""The run folder: configuration first, then metrics, checkpoint and results."""

from __future__ import annotations

import json
import tomllib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from privfed.errors import ResumeError
from privfed.files import write_atomic

# what a crash before the configuration was in place can leave: no run yet
_UNBORN = {"run.json", "run.json.tmp", "config.toml.tmp"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """A run folder on disk.

    Attributes:
        path: The folder.
        run_id: Unique for the run; the same after a resume.
        created: When the run was first started (ISO 8601, UTC).
    """

    path: Path
    run_id: str
    created: str

    @property
    def checkpoint(self) -> Path:
        """The checkpoint file."""
        return self.path / "checkpoint" / "state.safetensors"

    @property
    def own(self) -> Path:
        """What each client keeps to itself between rounds; on one machine only because clients are simulated."""
        return self.path / "checkpoint" / "clients"

    @property
    def clients(self) -> Path:
        """Each client's own model, where parts of it are personal."""
        return self.path / "clients"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        """The trained parts."""
        return self.path / "adapter"

    @property
    def transcript(self) -> Path:
        """What went over the wire, where the run is recorded."""
        return self.path / "transcript"

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def metrics_bytes(self) -> int:
        """Return the length of the metrics file."""
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def cut_metrics(self, size: int) -> None:
        """Drop lines that belong to a round that a crash cut short."""
        if self.metrics_bytes() > size:
            with self.metrics.open("r+b") as file:
                file.truncate(size)

    def write_json(self, name: str, value: Any) -> None:
        """Write ``value`` atomically."""
        write_atomic(self.path / name, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def check_new(path: Path) -> None:
    """Find out whether a run folder can be made at ``path``.

    Raises:
        ResumeError: If the folder holds another run, or is not a folder.
    """
    if path.exists() and not path.is_dir():
        raise ResumeError(f"{path} is a file: pass a folder for the run with -o.")
    if (path / "config.toml").exists():
        raise ResumeError(
            f"The folder {path} holds another run: pass --resume to continue it, or another folder with -o."
        )
    if path.exists() and any(entry.name not in _UNBORN for entry in path.iterdir()):
        raise ResumeError(f"The folder {path} is not empty and holds no run: pass an empty or new folder with -o.")


def create(path: Path, config_toml: str) -> RunFolder:
    """Make a new run folder and write the resolved configuration into it.

    Raises:
        ResumeError: If the folder holds another run, or is not a folder.
    """
    check_new(path)
    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path=path, run_id=uuid.uuid4().hex, created=datetime.now(UTC).isoformat(timespec="seconds"))
    folder.write_json("run.json", {"run_id": folder.run_id, "created": folder.created})
    write_atomic(path / "config.toml", config_toml.encode())
    return folder


def reopen(path: Path) -> tuple[RunFolder, dict[str, Any]]:
    """Return a run folder to continue, and its configuration as parsed TOML.

    Raises:
        ResumeError: If there is no run in the folder.
    """
    try:
        facts = json.loads((path / "run.json").read_text(encoding="utf-8"))
        raw = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
        folder = RunFolder(path=path, run_id=facts["run_id"], created=facts["created"])
    except (OSError, ValueError, KeyError) as error:
        raise ResumeError(f"There is no run to resume in {path}: leave --resume out to start one.") from error
    return folder, raw
