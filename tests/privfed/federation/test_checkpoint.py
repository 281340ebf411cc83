"""Checkpoints: every bit comes back, and a crash leaves the old file or the new one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from privfed.errors import ResumeError
from privfed.federation.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from privfed.federation.state import ServerState
from privfed.files import write_atomic


def _checkpoint(number: int = 3) -> Checkpoint:
    rng = np.random.default_rng(number)
    params = rng.standard_normal(50).astype(np.float32)
    params[:4] = [np.float32(-0.0), np.float32(1e-45), np.float32(3.4e38), np.float32(1 / 3)]
    state = ServerState(
        phase="train",
        round=number,
        params_D=params,
        optimizer={"m": params / 2, "v": params[::-1].copy()},
        taken={"c1": 2, "ü b/c": 1},
    )
    return Checkpoint(state=state, metrics_bytes=123, totals={"bytes_up": 7.0, "seconds": 1 / 3})


def _same(left: Checkpoint, right: Checkpoint) -> bool:
    a, b = left.state, right.state
    return (
        (a.phase, a.round, dict(a.taken)) == (b.phase, b.round, dict(b.taken))
        and a.params_D.tobytes() == b.params_D.tobytes()
        and a.params_D.dtype == b.params_D.dtype
        and {k: v.tobytes() for k, v in a.optimizer.items()} == {k: v.tobytes() for k, v in b.optimizer.items()}
        and (left.metrics_bytes, dict(left.totals)) == (right.metrics_bytes, dict(right.totals))
    )


def test_what_was_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint" / "state.safetensors"
    for saved in (_checkpoint(3), _checkpoint(4)):
        save_checkpoint(path, saved)
        found = load_checkpoint(path)
        assert found is not None
        assert _same(found, saved)
    assert [entry.name for entry in path.parent.iterdir()] == ["state.safetensors"]


def test_a_state_without_optimizer_vectors(tmp_path: Path) -> None:
    path = tmp_path / "state"
    plain = Checkpoint(state=ServerState(phase="p", round=0, params_D=np.zeros(3, np.float32)), metrics_bytes=0)
    save_checkpoint(path, plain)
    found = load_checkpoint(path)
    assert found is not None
    assert _same(found, plain)


def test_no_file_is_no_checkpoint(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "state") is None


@pytest.mark.parametrize("moment", ["write", "fsync", "rename"])
def test_a_crash_while_writing_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    path = tmp_path / "state"
    save_checkpoint(path, _checkpoint(1))

    def crash(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "rename":
            patch.setattr(Path, "replace", crash)
        elif moment == "fsync":
            patch.setattr("privfed.files.os.fsync", crash)
        else:
            patch.setattr("privfed.federation.checkpoint.save", lambda *a, **k: crash())
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(path, _checkpoint(2))
    found = load_checkpoint(path)
    assert found is not None
    assert _same(found, _checkpoint(1))
    save_checkpoint(path, _checkpoint(2))  # what the crash left is in nobody's way
    found = load_checkpoint(path)
    assert found is not None
    assert _same(found, _checkpoint(2))


def test_the_data_are_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    happened: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr("privfed.files.os.fsync", lambda handle: (happened.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda self, target: (happened.append("rename"), replace(self, target))[1])
    write_atomic(tmp_path / "file", b"x")
    assert happened == ["fsync", "rename", "fsync"]


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped header", "other tensors", "no params"])
def test_a_garbled_file_is_refused_with_its_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state"
    save_checkpoint(path, _checkpoint())
    data = path.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a checkpoint at all, but long enough to look like something")
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped header":
        path.write_bytes(data[:3] + bytes([data[3] ^ 0xFF]) + data[4:])
    elif damage == "other tensors":
        save_file({"x": np.zeros(3)}, path)
    else:
        tensors = load_file(path)
        del tensors["params"]
        fields = json.dumps(
            {"version": "1", "phase": "train", "round": 1, "taken": {}, "metrics_bytes": 0, "totals": {}, "done": False}
        )
        save_file(tensors, path, metadata={"privfed": fields})
    with pytest.raises(ResumeError, match="state"):
        load_checkpoint(path)


@pytest.mark.parametrize("fields", [{"version": "99"}, {}, [1], {"version": "1"}])
def test_another_version_and_missing_fields_are_refused(tmp_path: Path, fields: object) -> None:
    path = tmp_path / "state"
    save_file({"params": np.zeros(3, np.float32)}, path, metadata={"privfed": json.dumps(fields)})
    with pytest.raises(ResumeError, match="state"):
        load_checkpoint(path)
