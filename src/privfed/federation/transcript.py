"""Reads a recorded run back: what was broadcast, and each message or each sum. For audits; training never comes here.

Shape suffixes: S shared values, M values sent in a round, D the values of what a round sends, decoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from privfed.compression import CODECS, Codec, Ring
from privfed.compression.message import read
from privfed.config import RunConfig, parse_config
from privfed.errors import ConfigError, PrivfedError, ProtocolError
from privfed.federation.codecs import Place, codec_at
from privfed.federation.folder import reopen
from privfed.federation.messages import Broadcast
from privfed.federation.phases import phases
from privfed.federation.recorder import DIGEST, PHASE, RELEASE, VERSION, PhaseFacts, round_name
from privfed.federation.sharing import Selection
from privfed.rng import experiment_seed
from privfed.types import EncodedSum, Float32, ParamLayout


class TranscriptError(PrivfedError):
    """A transcript is missing, damaged, or of another format."""

    exit_code = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    """What was recorded of one round.

    Attributes:
        clients: Whose messages are there, in the order in which they came; none of a masked round.
        survivors: Who is in the sum.
        sent: The tensors that were sent.
        lost: Why the round is lost, where it is.
        digest: SHA-256 of the record.
    """

    phase: str
    round: int
    clients: tuple[str, ...]
    survivors: tuple[str, ...]
    sent: ParamLayout
    lost: str | None
    digest: str
    broadcast: bytes = field(repr=False)
    params_S: Float32 | None = field(repr=False)
    messages: tuple[bytes, ...] = field(repr=False)
    total: EncodedSum | None = field(repr=False)
    mean_D: Float32 | None = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRecord:
    """Two models that were released one after the other.

    Attributes:
        round: The round after which the second was released.
        contributors: How many clients' updates lie between them.
        before: The first one's tensors.
        change: Second minus first, of what is trained and shared.
    """

    phase: str
    round: int
    contributors: int
    layout: ParamLayout
    before: Mapping[str, Float32] = field(repr=False)
    change: Mapping[str, Float32] = field(repr=False)


class Transcript:
    """A recorded run.

    Args:
        folder: The run folder.

    Raises:
        TranscriptError: If the run was not recorded.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _, raw = reopen(folder)
        self.config: RunConfig = parse_config(raw, where=str(folder / "config.toml"))
        self.masked = self.config.secagg.name == "masked"
        root = folder / "transcript"
        self._phases = {name: root / name for name, _, _ in phases(self.config) if (root / name / PHASE).exists()}
        if not self._phases:
            raise TranscriptError(f"The run in {folder} was not recorded: train it with -s audit.record=true.")
        self._facts = {name: _facts(path / PHASE) for name, path in self._phases.items()}

    @property
    def phases(self) -> tuple[str, ...]:
        """The recorded phases, in order."""
        return tuple(self._phases)

    def rounds(self, phase: str | None = None) -> Iterator[RoundRecord]:
        """Yield the rounds in order, each read when it is asked for.

        Raises:
            TranscriptError: If a record is damaged or one is missing in between.
        """
        for name in self.phases if phase is None else (phase,):
            paths = sorted(self._phases[name].glob("[0-9]*.msgpack"))
            for number, path in enumerate(paths, start=1):
                if path.name != round_name(number):
                    raise TranscriptError(f"Round {number} of the phase {name!r} is missing in {path.parent}.")
                yield _round(path, name)

    def params(self, record: RoundRecord) -> dict[str, Float32]:
        """Return what was broadcast in a round: shared tensors by name, and what the server carries beside them."""
        facts = self._facts[record.phase]
        received = Broadcast.from_bytes(record.broadcast, size=facts.shared.size)
        params_S = received.params_D if record.params_S is None else record.params_S
        return {**_tensors(params_S, facts.shared), **received.carried}

    def update(self, record: RoundRecord, client_id: str) -> Float32:
        """Return one client's update [D] as its message says it.

        Raises:
            ConfigError: If the client sent nothing that was recorded, or the codec cannot be decoded alone.
            ProtocolError: If the message is damaged.
        """
        if client_id not in record.clients:
            raise ConfigError(f"Round {record.round} has no message of {client_id!r}: it has {list(record.clients)}.")
        codec, length = self._codec(record), self._length(record)
        received = read(record.messages[record.clients.index(client_id)], length=length, codec=codec)
        return self._decoded(codec, received.alone(codec, length), record)

    def mean(self, record: RoundRecord) -> Float32 | None:
        """Return the average of the survivors' updates [D] *as the server had it*; None for a lost round.

        Under client-level privacy at a trusted server this is before the noise.
        """
        if record.lost is not None or not record.survivors:
            return None
        if record.mean_D is not None:
            return record.mean_D
        if record.total is not None:
            return self._decoded(self._codec(record), record.total, record)
        updates = np.stack([self.update(record, client) for client in record.survivors])
        return np.asarray(updates.mean(axis=0, dtype=np.float64), dtype=np.float32)

    def releases(self, *, every_iterate: bool) -> Iterator[ReleaseRecord]:
        """Yield the changes between released models.

        Args:
            every_iterate: The change of every round, as clients see it; or one change, from the start of the last
                phase to its end.
        """
        for phase in self.phases if every_iterate else self.phases[-1:]:
            models = list(self._models(phase))
            pairs = list(pairwise(models)) if every_iterate else [(models[0], models[-1])]
            layout = self._facts[phase].shared
            for (before, survivors, _), (after, _, number) in pairs:
                change = {name: after[name] - before[name] for name in layout.names}
                yield ReleaseRecord(
                    phase=phase,
                    round=number,
                    contributors=survivors if every_iterate else int(self.public(phase)["clients"]),
                    layout=layout,
                    before=before,
                    change=change,
                )

    def public(self, phase: str) -> dict[str, Any]:
        """Return what is public about a phase: the configuration but for where the data lie."""
        config = self.config
        client, server = next((c, s) for name, c, s in phases(config) if name == phase)
        partition = json.loads((self.folder / "partition.json").read_text(encoding="utf-8"))
        clients = len(partition["clients"])
        return {
            "model": config.model,
            "tuning": config.tuning,
            "init_seed": experiment_seed(config.seed, "init") % (1 << 31),
            "client": client,
            "label_names": tuple(partition["label_names"]),
            "clients": clients,
            "cohort_size": server.cohort_size or clients,
            "masked": self.masked,
            "compression": config.compression,
            "unit": config.privacy.unit,
            "noise_multiplier": self._facts[phase].noise_multiplier,
            "l2_clip_norm": config.privacy.l2_clip_norm if config.privacy.on else None,
        }

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of every file's content by its path in the transcript, as the files say it; all checked.

        Raises:
            TranscriptError: If one does not hold what its digest says.
        """
        found = {}
        for phase, folder in self._phases.items():
            for path in sorted(folder.glob("*.msgpack")):
                found[f"{phase}/{path.name}"] = _opened(path)[1]
        return found

    def _models(self, phase: str) -> Iterator[tuple[dict[str, Float32], int, int]]:
        """Yield (tensors, survivors of the round that follows, rounds done) of every released model."""
        number = 0
        for record in self.rounds(phase):
            yield self.params(record), len(record.survivors), record.round - 1
            number = record.round
        path = self._phases[phase] / RELEASE
        if path.exists():
            content, _ = _opened(path)
            carried = {name: _array(data, shape) for name, (shape, data) in content["carried"].items()}
            params_S = np.frombuffer(content["params"], dtype="<f4").astype(np.float32)
            yield {**_tensors(params_S, self._facts[phase].shared), **carried}, 0, number

    def _length(self, record: RoundRecord) -> int:
        return record.sent.size + self._facts[record.phase].extra

    def _codec(self, record: RoundRecord) -> Codec:
        """Return the codec of a round.

        Raises:
            ConfigError: If what it decodes depends on more than the message.
        """
        name = str(getattr(self.config.compression, "name", ""))
        ring = self._facts[record.phase].ring
        codec = CODECS.get(name).build(
            self.config.compression, None if ring is None else Ring(bits=ring[0], clients=ring[1])
        )
        found = codec.properties
        if found.second_pass or found.server_state or not found.separable:
            raise ConfigError(
                f"compression.name = {name!r}: its messages mean nothing without the server's state, which a "
                "transcript does not hold; use the view aggregate without client-level privacy, or release."
            )
        facts = self._facts[record.phase]
        place = Place(seed=self.config.seed, run_id=facts.run_id, phase=record.phase, round=record.round)
        received = Broadcast.from_bytes(record.broadcast, size=facts.shared.size)
        return codec_at(codec, place, Selection(record.sent, record.sent.names), received.codec)

    def _decoded(self, codec: Codec, total: EncodedSum, record: RoundRecord) -> Float32:
        """Return the decoded average of a sum: the codec's additive part first, then the rest of decoding."""
        length = self._length(record)
        average: NDArray[np.float64] = codec.linear_sum(total) / total.total_weight
        values_D, _ = codec.expand(average, codec.start_state(length), length)
        return values_D[: record.sent.size].astype(np.float32)


def _opened(path: Path) -> tuple[dict[str, Any], str]:
    """Return a file's content and its digest.

    Raises:
        TranscriptError: If it is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TranscriptError(f"The transcript's file {path} cannot be read: {error}.") from error
    digest, body = data[:DIGEST], data[DIGEST:]
    if hashlib.sha256(body).digest() != digest:
        raise TranscriptError(f"The transcript's file {path} is damaged: its content does not have its digest.")
    content: dict[str, Any] = msgpack.unpackb(body)
    if content.get("version") != VERSION:
        raise TranscriptError(f"{path} has version {content.get('version')!r}, expected {VERSION}.")
    return content, digest.hex()


def _facts(path: Path) -> PhaseFacts:
    content, _ = _opened(path)
    ring = content["ring"]
    return PhaseFacts(
        run_id=content["run_id"],
        phase=content["phase"],
        layout=_layout(content["layout"]),
        shared=_layout(content["shared"]),
        extra=content["extra"],
        ring=None if ring is None else (ring[0], ring[1]),
        noise_multiplier=content["noise_multiplier"],
    )


def _round(path: Path, phase: str) -> RoundRecord:
    content, digest = _opened(path)
    messages = tuple(content["messages"])
    return RoundRecord(
        phase=phase,
        round=content["round"],
        clients=tuple(_sender(message) for message in messages),
        survivors=tuple(content["survivors"]),
        sent=_layout(content["sent"]),
        lost=content["lost"],
        digest=digest,
        broadcast=content["broadcast"],
        params_S=_floats(content["params"]),
        messages=messages,
        total=None if content["total"] is None else _sum(content["total"]),
        mean_D=_floats(content["mean"]),
    )


def _sender(message: bytes) -> str:
    """Return the client that a message names: the second field of its header."""
    try:
        size = int.from_bytes(message[:2], "little")
        return str(msgpack.unpackb(message[2 : 2 + size])[1])
    except (ValueError, IndexError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"A recorded message's header cannot be read: {error}.") from error


def _sum(content: Mapping[str, Any]) -> EncodedSum:
    values = np.frombuffer(content["values"], dtype=np.dtype(content["dtype"]))
    return EncodedSum(
        sum_M=values.astype(values.dtype.newbyteorder("="), copy=True),
        codec=content["codec"],
        scale=content["scale"],
        length=content["length"],
        survivors=content["survivors"],
        total_weight=content["total_weight"],
    )


def _layout(content: Sequence[Any]) -> ParamLayout:
    names, shapes, digest = content
    return ParamLayout(names=tuple(names), shapes=tuple(tuple(shape) for shape in shapes), digest=digest)


def _tensors(values: Float32, layout: ParamLayout) -> dict[str, Float32]:
    parts = np.split(values, np.cumsum(layout.sizes)[:-1])
    return {name: part.reshape(shape) for name, shape, part in zip(layout.names, layout.shapes, parts, strict=True)}


def _floats(data: bytes | None) -> Float32 | None:
    return None if data is None else np.frombuffer(data, dtype="<f4").astype(np.float32)


def _array(data: bytes, shape: Sequence[int]) -> Float32:
    return np.frombuffer(data, dtype="<f4").astype(np.float32).reshape(shape)
