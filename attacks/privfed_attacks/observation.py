"""What an adversary sees: the only thing an attack may read.

A :class:`ThreatModel` says who looks and at what. Its ``view`` of a recorded run copies exactly that out of the
transcript into :class:`Observation` values and lets go of the rest: nothing an attack is handed refers to the
transcript, to its files, or to a message that the vantage does not include (``tests/attacks/test_observation.py``
walks the object graph).

This is the one module of the package that may import ``privfed.federation``. Attacks import it, ``privfed.models``,
``privfed.tuning`` and what lies below them.

Shape suffix: D values of the tensors in ``layout``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from privfed.errors import ConfigError
from privfed.models.config import ModelConfig
from privfed.schedule import ClientConfig
from privfed.table import Table
from privfed.types import Float32, ParamLayout, View

if TYPE_CHECKING:
    from privfed.federation.transcript import Transcript

Role = Literal["server", "client", "outsider"]
Change = Literal["broadcast", "own_data"]
Knowledge = Literal["model", "tuning", "training"]
Tensors = Mapping[str, Float32]
EVERYTHING: frozenset[Knowledge] = frozenset({"model", "tuning", "training"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SideInformation:
    """What is public about a run, as far as the adversary knows it. Where the data lie is no part of it.

    Attributes:
        model: The base model, and with it the tokenizer; None where the adversary does not know it.
        tuning: The tuning's table; None where not known.
        init_seed: Seed of the tuning's fresh parameters, the same at every client.
        client: Optimiser, learning rates, local steps and batch size of the phase; None where not known.
        label_names: The classes; empty where there are none.
        clients: How many clients the run has.
        cohort_size: How many are asked in a round.
        masked: Whether updates were summed under secure aggregation.
        compression: The codec's table, which an adaptive attack takes into account.
        unit: The privacy unit, ``"none"`` without privacy.
        noise_multiplier: Of the phase's mechanism, None without noise.
        l2_clip_norm: Its clip, None without noise.
    """

    model: ModelConfig | None
    tuning: Table | None
    init_seed: int
    client: ClientConfig | None
    label_names: tuple[str, ...] = ()
    clients: int = 1
    cohort_size: int = 1
    masked: bool = False
    compression: Table | None = None
    unit: str = "none"
    noise_multiplier: float | None = None
    l2_clip_norm: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What was seen in one round, or of the release.

    Attributes:
        vantage: ``individual``: the payload is one client's update; ``aggregate``: the average over the survivors of a
            round; ``release``: the change of the model between two releases.
        phase: The phase of the run.
        round: The round, from 1; for a release, the one after which it was made.
        source: Whose update it is; None for an average and a release.
        contributors: How many clients' updates are in the payload.
        params: The tensors before the round, by name: those that are trained and shared, and those that the server
            carries beside them.
        payload: The decoded update, by tensor name: new minus old parameters.
        layout: The tensors of the payload, in order.
        side: What is public.
    """

    vantage: View
    phase: str
    round: int
    source: str | None
    contributors: int
    params: Tensors = field(repr=False)
    payload: Tensors = field(repr=False)
    layout: ParamLayout = field(repr=False)
    side: SideInformation = field(repr=False)

    def __post_init__(self) -> None:
        shapes = dict(zip(self.layout.names, self.layout.shapes, strict=True))
        given = {name: tuple(value.shape) for name, value in self.payload.items()}
        if given != shapes:
            raise ConfigError("The payload of an observation does not have the tensors that its layout names.")
        for name in ("params", "payload"):
            frozen = MappingProxyType({key: _fixed(value) for key, value in getattr(self, name).items()})
            object.__setattr__(self, name, frozen)

    def flat(self) -> Float32:
        """Return the payload as one vector [D], in the layout's order."""
        return np.concatenate([self.payload[name].ravel() for name in self.layout.names])


@dataclass(frozen=True, slots=True, kw_only=True)
class Observations(Sequence[Observation]):
    """Everything that one adversary saw of a run, in the order of the rounds.

    Attributes:
        threat: Who looked.
        seen: The observations.
    """

    threat: ThreatModel
    seen: tuple[Observation, ...]

    @overload
    def __getitem__(self, index: int) -> Observation: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Observation, ...]: ...

    def __getitem__(self, index: int | slice) -> Observation | tuple[Observation, ...]:
        return self.seen[index]

    def __len__(self) -> int:
        return len(self.seen)

    def __iter__(self) -> Iterator[Observation]:
        return iter(self.seen)

    def of(self, phase: str) -> tuple[Observation, ...]:
        """Return the observations of one phase."""
        return tuple(each for each in self.seen if each.phase == phase)

    def sources(self) -> dict[str | None, tuple[Observation, ...]]:
        """Return the observations by whose update they are; those of averages and releases under None."""
        found: dict[str | None, list[Observation]] = {}
        for each in self.seen:
            found.setdefault(each.source, []).append(each)
        return {source: tuple(rows) for source, rows in found.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreatModel:
    """An adversary.

    Attributes:
        role: Who it is: the ``server``, a ``client`` of the run, or an ``outsider`` who has the released model.
        observes: ``individual`` (the server without secure aggregation), ``aggregate`` (the server with it) or
            ``release`` (a client sees every iterate, an outsider the last one).
        can_modify: What it may change: the ``broadcast`` (a malicious server), its ``own_data`` (a client that sends
            canaries). Empty: it only looks.
        knows: What it knows of the run: the base ``model``, the ``tuning``, and how clients do their ``training``.
        auxiliary: Texts it has from elsewhere, to learn from; never the clients'.
        clients: Whose updates it sees in an individual view; None for all.
    """

    role: Role = "server"
    observes: View = "individual"
    can_modify: frozenset[Change] = frozenset()
    knows: frozenset[Knowledge] = EVERYTHING
    auxiliary: tuple[str, ...] = ()
    clients: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if self.role != "server" and self.observes != "release":
            raise ConfigError(
                f"A threat model of role {self.role!r} that observes {self.observes!r}: only the server sees updates; "
                'use role = "server", or observes = "release".'
            )
        if "broadcast" in self.can_modify and self.role != "server":
            raise ConfigError(f"Only a server can modify the broadcast, not the role {self.role!r}.")
        if "own_data" in self.can_modify and self.role != "client":
            raise ConfigError(f"Only a client can modify its own data, not the role {self.role!r}.")

    def view(self, transcript: Transcript) -> Observations:
        """Return what this adversary saw of a recorded run.

        Raises:
            ConfigError: If the run was masked and the adversary asks for single updates, or the transcript is
                damaged.
        """
        seen = {"individual": self._individual, "aggregate": self._aggregate, "release": self._release}
        return Observations(threat=self, seen=tuple(seen[self.observes](transcript)))

    def side(self, **facts: Any) -> SideInformation:
        """Return side information without what this adversary does not know."""
        if "model" not in self.knows:
            facts["model"] = None
        if "tuning" not in self.knows:
            facts["tuning"] = None
        if "training" not in self.knows:
            facts["client"] = None
        return SideInformation(**facts)

    def _individual(self, transcript: Transcript) -> Iterator[Observation]:
        if transcript.masked:
            raise ConfigError(
                "This run was masked: nobody saw the update of a single client, and the transcript has none; "
                "use the view aggregate."
            )
        for record in transcript.rounds():
            for client_id in record.clients:
                if self.clients is None or client_id in self.clients:
                    delta_D = transcript.update(record, client_id)
                    yield self._observed(transcript, record, delta_D, source=client_id, contributors=1)

    def _aggregate(self, transcript: Transcript) -> Iterator[Observation]:
        for record in transcript.rounds():
            mean_D = transcript.mean(record)
            if mean_D is not None:
                yield self._observed(transcript, record, mean_D, source=None, contributors=len(record.survivors))

    def _release(self, transcript: Transcript) -> Iterator[Observation]:
        for release in transcript.releases(every_iterate=self.role != "outsider"):
            yield Observation(
                vantage="release",
                phase=release.phase,
                round=release.round,
                source=None,
                contributors=release.contributors,
                params=release.before,
                payload=release.change,
                layout=release.layout,
                side=self.side(**transcript.public(release.phase)),
            )

    def _observed(
        self, transcript: Transcript, record: Any, delta_D: Float32, *, source: str | None, contributors: int
    ) -> Observation:
        return Observation(
            vantage=self.observes,
            phase=record.phase,
            round=record.round,
            source=source,
            contributors=contributors,
            params=transcript.params(record),
            payload=split(delta_D, record.sent),
            layout=record.sent,
            side=self.side(**transcript.public(record.phase)),
        )


def split(values_D: Float32, layout: ParamLayout) -> dict[str, Float32]:
    """Return a flat vector as tensors by name."""
    parts = np.split(values_D, np.cumsum(layout.sizes)[:-1])
    return {name: part.reshape(shape) for name, shape, part in zip(layout.names, layout.shapes, parts, strict=True)}


def _fixed(value: Float32) -> Float32:
    """Return a copy with memory of its own that cannot be written: a view would hold on to what it is cut from."""
    own = np.array(value, dtype=np.float32, copy=True)
    own.flags.writeable = False
    return own
