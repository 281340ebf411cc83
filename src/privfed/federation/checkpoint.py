"""A checkpoint a round, written atomically: after a crash the file is the old one or the new one, never a mixture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from privfed.errors import ResumeError
from privfed.federation.state import ServerState
from privfed.files import write_atomic

VERSION = "3"
_READABLE = {"1", "2", VERSION}  # version 1 had nothing carried, version 2 no codec's state


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Where a run stands after a round.

    Attributes:
        state: The server's state.
        metrics_bytes: Length of metrics.jsonl at this point; what lies beyond belongs to an unfinished round.
        totals: Running totals (bytes, seconds) for the final report.
    """

    state: ServerState
    metrics_bytes: int
    totals: Mapping[str, float] = field(default_factory=dict)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to ``path`` (safetensors with the small fields as metadata)."""
    state = checkpoint.state
    tensors: dict[str, Any] = {"params": state.params_D}
    kinds: dict[str, Mapping[str, Any]] = {
        "optimizer": state.optimizer,
        "mechanism": state.mechanism,
        "carried": state.carried,
        "codec": state.codec,
    }
    for kind, vectors in kinds.items():
        tensors |= {f"{kind}.{name}": vector for name, vector in vectors.items()}
    fields = {
        "version": VERSION,
        "phase": state.phase,
        "round": state.round,
        "taken": dict(state.taken),
        "metrics_bytes": checkpoint.metrics_bytes,
        "totals": dict(checkpoint.totals),
    }
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save(arrays, metadata={"privfed": json.dumps(fields)}))


def load_checkpoint(path: Path) -> Checkpoint | None:
    """Return the checkpoint at ``path``, or None if there is none.

    Raises:
        ResumeError: If the file is not a checkpoint of this version.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            fields: dict[str, Any] = json.loads((file.metadata() or {})["privfed"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if fields["version"] not in _READABLE:
            raise ResumeError(f"{path} is a checkpoint of version {fields['version']}, expected {VERSION}.")
        return _parsed(fields, tensors)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, OSError) as error:
        raise ResumeError(f"{path} is not a checkpoint ({error}): start the run anew in an empty folder.") from error


def _parsed(fields: Mapping[str, Any], tensors: dict[str, Any]) -> Checkpoint:
    state = ServerState(
        phase=fields["phase"],
        round=fields["round"],
        params_D=tensors.pop("params"),
        optimizer=_of_kind("optimizer", tensors),
        mechanism=_of_kind("mechanism", tensors),
        taken=fields["taken"],
        carried=_of_kind("carried", tensors),
        codec=_of_kind("codec", tensors),
    )
    return Checkpoint(state=state, metrics_bytes=fields["metrics_bytes"], totals=fields["totals"])


def _of_kind(kind: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(f"{kind}."): value for name, value in tensors.items() if name.startswith(f"{kind}.")}
