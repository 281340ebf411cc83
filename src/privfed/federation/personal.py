"""What a client keeps from round to round: personal tensors and control variates, in files of its own.

A file is written for each round that changes it and older ones are removed only once the server's checkpoint of a
later round is durable, so a run that was killed anywhere finds the state that its checkpoint belongs to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load, save

from privfed.errors import ResumeError
from privfed.files import write_atomic
from privfed.types import Float32

PERSONAL = "personal"
"""Name of the personal tensors, as one flat vector, in a client's state."""
_SUFFIX = ".safetensors"
_LONGEST = 80


def folder_name(client_id: str) -> str:
    """Return a name for the client's folder that every file system takes; different clients get different ones."""
    # lower case only: some file systems take a and A for the same
    safe = "".join(c if c.isascii() and (c.islower() or c.isdigit() or c in "-_") else "_" for c in client_id)
    safe = safe[:_LONGEST]
    if safe == client_id and safe:
        return safe
    return f"{safe}.{hashlib.sha256(client_id.encode()).hexdigest()[:12]}"


class PersonalStore:
    """The clients' own states under one folder, one sub-folder a client; nothing is kept in memory.

    Args:
        folder: Made when the first state is saved.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._touched: set[str] = set()

    def load(self, client_id: str, *, before: int) -> dict[str, Float32]:
        """Return the client's state as it was before a round; empty if it has taken part in none.

        Raises:
            ResumeError: If its file cannot be read.
        """
        found = [(number, path) for number, path in self._versions(client_id) if number < before]
        if not found:
            return {}
        path = max(found)[1]
        try:
            return dict(load(path.read_bytes()))
        except (SafetensorError, OSError) as error:
            raise ResumeError(f"The client's state {path} cannot be read ({error}): start the run anew.") from error

    def save(self, client_id: str, round_number: int, state: Mapping[str, Float32]) -> None:
        """Write the client's state after a round, atomically; the one before stays until ``settle``."""
        folder = self._folder / folder_name(client_id)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"{round_number:08d}{_SUFFIX}", save(dict(state)))
        self._touched.add(client_id)

    def settle(self, round_number: int) -> None:
        """Forget what clients had before their last round up to this one, whose checkpoint is durable."""
        for client_id in sorted(self._touched):
            versions = sorted(each for each in self._versions(client_id) if each[0] <= round_number)
            for _, path in versions[:-1]:
                path.unlink(missing_ok=True)
        self._touched.clear()

    def _versions(self, client_id: str) -> list[tuple[int, Path]]:
        folder = self._folder / folder_name(client_id)
        if not folder.is_dir():
            return []
        return [(int(path.stem), path) for path in folder.iterdir() if path.suffix == _SUFFIX and path.stem.isdigit()]
