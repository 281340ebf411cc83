"""Writes what went over the wire into the run folder, where ``[audit] record`` asks for it. Nothing here reads it back.

One file a round, written whole when the round is over and before its checkpoint: a round that a crash cut short is
recorded again, over its file. A file is the SHA-256 of what follows (32 bytes) and one msgpack map; no pickles.

* Unmasked: the broadcast, and each client's message as it was sent.
* Masked: the broadcast, the encoded sum and who survived. The recorder sits at the server's side of secure aggregation
  and is never handed a client's values.

Whatever a client sent had its noise in it where the client adds noise; what a trusted server adds is added later, so
under client-level privacy at a server these files hold sums *without* it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from privfed.files import write_atomic
from privfed.types import EncodedSum, Float32, ParamLayout

VERSION = 1
PHASE, RELEASE = "phase.msgpack", "release.msgpack"
DIGEST = 32

UNMASKED = (
    "This run was recorded for audits: transcript/ holds the message of every single client{noise}. Whoever has the "
    "folder can attack single clients: keep it as closely as the data, or delete it."
)
MASKED = (
    "This run was recorded for audits: transcript/ holds the sum of each round{noise}, as the server of secure "
    "aggregation had it, and no client's own message."
)
NOISED = {
    "local": ", with the noise that the clients added",
    "distributed": ", with the clients' shares of the noise in it",
    "central": ", before the server added its noise",
    "none": ", without noise",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseFacts:
    """What a reader needs of a phase beside the configuration.

    Attributes:
        layout: All tensors that clients train.
        shared: Those of them that are broadcast and sent in some round.
        extra: Values that the privacy mechanism sends behind the update.
        ring: (bits, clients) of the ring of masked sums, or None.
        noise_multiplier: Of the phase's mechanism, None without noise.
    """

    run_id: str
    phase: str
    layout: ParamLayout
    shared: ParamLayout
    extra: int
    ring: tuple[int, int] | None
    noise_multiplier: float | None

    def record(self) -> dict[str, Any]:
        """Return the facts as msgpack takes them."""
        return {
            "run_id": self.run_id,
            "phase": self.phase,
            "layout": packed_layout(self.layout),
            "shared": packed_layout(self.shared),
            "extra": self.extra,
            "ring": self.ring,
            "noise_multiplier": self.noise_multiplier,
        }


@dataclass(slots=True)
class Recorder:
    """Records one phase.

    Attributes:
        folder: The phase's own folder; made on the first write.
        facts: The phase.
    """

    folder: Path
    facts: PhaseFacts
    _round: int = 0
    _broadcast: bytes = field(default=b"", repr=False)
    _messages: list[bytes] = field(default_factory=list, repr=False)

    def opened(self, round_number: int, broadcast: bytes) -> None:
        """Note a round's broadcast; whatever an earlier attempt at the round left is forgotten."""
        self._round, self._broadcast, self._messages = round_number, broadcast, []

    def message(self, message: bytes) -> None:
        """Note the message of one client, as the server received it."""
        self._messages.append(message)

    def closed(
        self,
        *,
        sent: ParamLayout,
        total: EncodedSum | None,
        survivors: tuple[str, ...],
        mean_M: NDArray[np.float64] | None,
        lost: str | None,
    ) -> None:
        """Write the round.

        Args:
            sent: The tensors that were sent in it.
            total: The sum, where it was masked.
            survivors: Who is in the sum.
            mean_M: The averaged update as the server decoded it, where no noise was added to it at the server.
            lost: Why the round is lost, where it is.
        """
        found: dict[str, Any] = {
            "round": self._round,
            "broadcast": self._broadcast,
            "messages": self._messages,
            "sent": packed_layout(sent),
            "total": None if total is None else _packed_sum(total),
            "survivors": list(survivors),
            "mean": None if mean_M is None else mean_M.astype("<f4").tobytes(),
            "lost": lost,
        }
        self._write(round_name(self._round), found)
        self._broadcast, self._messages = b"", []

    def released(self, round_number: int, params_S: Float32, carried: Mapping[str, Float32]) -> None:
        """Write what the phase ended with."""
        tensors = {name: [list(value.shape), value.astype("<f4").tobytes()] for name, value in carried.items()}
        found = {"round": round_number, "params": params_S.astype("<f4").tobytes(), "carried": tensors}
        self._write(RELEASE, found)

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        if not (self.folder / PHASE).exists():
            self.folder.parent.mkdir(mode=0o700, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            write_atomic(self.folder / PHASE, _sealed(self.facts.record()))
        write_atomic(self.folder / name, _sealed(content))


def note(*, masked: bool, placement: str) -> str:
    """Return what a receipt says of a recorded run.

    Args:
        masked: Whether updates were masked.
        placement: Where the noise was added: a key of ``NOISED``.
    """
    return (MASKED if masked else UNMASKED).format(noise=NOISED[placement])


def round_name(round_number: int) -> str:
    """Return the file name of a round."""
    return f"{round_number:06d}.msgpack"


def packed_layout(layout: ParamLayout) -> list[Any]:
    """Return a layout as msgpack takes it."""
    return [list(layout.names), [list(shape) for shape in layout.shapes], layout.digest]


def _packed_sum(total: EncodedSum) -> dict[str, Any]:
    values = np.ascontiguousarray(total.sum_M)
    return {
        "dtype": values.dtype.newbyteorder("<").str,
        "values": values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes(),
        "codec": total.codec,
        "scale": total.scale,
        "length": total.length,
        "survivors": total.survivors,
        "total_weight": total.total_weight,
    }


def _sealed(content: Mapping[str, Any]) -> bytes:
    """Return a file's bytes: digest, then content."""
    body: bytes = msgpack.packb({"version": VERSION, **content})
    return hashlib.sha256(body).digest() + body
