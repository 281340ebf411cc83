"""Distributed noise in a round: what clients send, when a sum may be revealed, and what the server makes of it.

A client sends integers with its share of the noise, masked; only the sum of at least ``n_min`` of them is ever had.
Its share derives from the round's broadcast, so a round that a crash cut short gives the same integers again, and one
charge. For that to be safe the *set of survivors* must be the same again too: two sums over different survivors would
give the difference, with the noise of a few clients only. So the holder writes the survivors to the ledger before any
client helps to unmask, and a round is unmasked for one set only.

Under example level a client sends the sum of the clipped gradients of one Poisson batch, and the server takes one step
with the sum over the expected batches of the survivors. Shard sizes and sampling probabilities are public, and so is
who survived; the denominator is computed from these alone.

Shape legend: D trained values; M encoded values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError, RoundError
from privfed.privacy.config import PrivacyConfig
from privfed.privacy.discrete.mechanism import decode_sum, encode
from privfed.privacy.discrete.params import DiscreteParams
from privfed.privacy.discrete.planning import discrete_params, survivors_event
from privfed.privacy.mechanisms import REPEATED, Keeper, Moment, committed
from privfed.rng import PrivateStream
from privfed.types import Encoded, EncodedSum, Float32, ParamLayout, Shard

if TYPE_CHECKING:
    from privfed.config import RunConfig
    from privfed.federation.local import LocalTrainer, StepDone
    from privfed.privacy.plan import PhasePlan, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Distributed noise in one phase, at the clients and at the server; all of it is public.

    Attributes:
        params: What all parties agree on, but for the seed of a rotation.
        privacy: The ``[privacy]`` table.
        phase: Name of the phase.
        rates_D: Example level: the learning rate of each trained value; None under client level.
        batches: Example level: each client's expected batch.
    """

    params: DiscreteParams
    privacy: PrivacyConfig
    phase: str
    rates_D: NDArray[np.float64] | None = field(default=None, repr=False)
    batches: Mapping[str, float] = field(default_factory=dict, repr=False)

    def vector(
        self, trainer: LocalTrainer, params_D: Float32, shard: Shard, stream: PrivateStream, on_step: StepDone
    ) -> NDArray[np.float64] | Float32:
        """Return what a client adds to the sum [D], before clipping (client level) and noise."""
        if self.params.unit == "client":
            return trainer.run(params_D, shard, stream, on_step)
        return trainer.gradient_sum(params_D, shard, stream, on_step)

    def encode(
        self, vector_D: NDArray[np.float64] | Float32, run_id: str, round_number: int, stream: PrivateStream
    ) -> Encoded:
        """Return a client's residues [M]: clipped, scaled, rounded, with its share of the noise."""
        params = self._seeded(run_id, round_number)
        return Encoded(
            values_M=encode(vector_D, params, stream),
            codec=params.noise,
            num_bits=params.ring_bits,
            scale=1 / params.scale,
            length=params.encoded_length,
            l2_bound=None,
        )

    def refusal(self, survivors: Sequence[str], broadcast: bytes, round_number: int, keeper: Keeper) -> str | None:
        """Return why the sum over these survivors must not be unmasked, or None once they are in the ledger.

        The record has no steps and costs nothing; it is the proof of how much honest noise a revealed sum had.
        Fewer than ``n_min`` are not recorded: secure aggregation itself refuses them.
        """
        if len(survivors) < self.params.n_min:
            return None
        moment = Moment(phase=self.phase, round=round_number, broadcast=broadcast)
        names = "\x1f".join(sorted(survivors)).encode()
        digest = hashlib.sha256(hashlib.sha256(broadcast).digest() + names).hexdigest()
        event = survivors_event(self.params, len(survivors), self.privacy)
        return None if committed(keeper, moment, digest, event) == digest else REPEATED

    def update(
        self, total: EncodedSum, survivors: Sequence[str], run_id: str, round_number: int
    ) -> NDArray[np.float64]:
        """Return the round's averaged update [D], new minus old parameters.

        Raises:
            RoundError: If fewer survived than ``n_min``, or the sum is not over these survivors.
        """
        if total.survivors != len(survivors):
            raise RoundError(f"Got a sum over {total.survivors} clients, expected {len(survivors)}.")
        params = self._seeded(run_id, round_number)
        residues_M = np.asarray(total.sum_M).astype(np.uint64)
        sum_D: NDArray[np.float64] = decode_sum(residues_M, params, total.survivors)
        if self.rates_D is None:
            return sum_D / total.survivors
        gradient_D: NDArray[np.float64] = sum_D / sum(self.batches[client] for client in survivors)
        return -self.rates_D * gradient_D

    def _seeded(self, run_id: str, round_number: int) -> DiscreteParams:
        """Return the parameters with the round's own rotation, which follows from what was broadcast."""
        if not self.params.rotate:
            return self.params
        name = f"privfed rotation/{run_id}/{self.phase}/{round_number}".encode()
        return replace(self.params, rotation_seed=hashlib.sha256(name).digest())


def make_shares(
    config: RunConfig,
    shards: Sequence[Shard],
    phase: PhasePlan,
    plan: Plan | None,
    layout: ParamLayout,
    trainer: LocalTrainer,
) -> Shares | None:
    """Return the noise that clients of a phase add in shares, or None where they add none.

    Args:
        config: The run.
        shards: Who holds how much, which is public.
        phase: The phase, with what was planned for its sums.
        plan: The run's plan, or None without privacy.
        layout: What is trained, and all of it sent.
        trainer: Trains it.

    Raises:
        ConfigError: If the phase sends another number of values than was planned for.
    """
    if plan is None or not config.privacy.is_distributed:
        return None
    params = discrete_params(config.privacy, phase, plan.noise_multiplier)
    if params.length != layout.size:
        raise ConfigError(f"Phase {phase.name} sends {layout.size} values and was planned for {params.length}.")
    by_example = config.privacy.unit == "example"
    return Shares(
        params=params,
        privacy=config.privacy,
        phase=phase.name,
        rates_D=trainer.rates(layout) if by_example else None,
        batches={s.client_id: trainer.config.expected_batch(len(s)) for s in shards} if by_example else {},
    )
