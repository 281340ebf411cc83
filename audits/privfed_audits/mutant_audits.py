"""Audits of the shipped trainer, quick enough to be repeated, for the bugs of ``privfed_audits.mutants``.

A small model with a body and a head is trained by ``LocalTrainer`` on a few ordinary examples and many canaries with
given gradients, planned by ``make_plan`` for a claimed epsilon. Each audit looks for another kind of leak:

* ``step``: one step on all records; canaries against independent noise.
* ``rounds``: several steps on Poisson samples, each seen by itself.
* ``lonely``: many clients with one ordinary record each, and one canary or none.
* ``clients``: a round of client-level privacy; each canary is a client.

Shape suffixes: M canaries, R rounds, D trained values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from privfed.errors import ConfigError
from privfed.federation.local import ExampleDp, LocalTrainer
from privfed.federation.planted import BEYOND, GivenGradients, PlantedExamples, given_gradients
from privfed.models.examples import FeatureExamples
from privfed.privacy.config import PrivacyConfig
from privfed.privacy.mechanisms import Moment, Site, built
from privfed.privacy.plan import PhasePlan, Plan, make_plan
from privfed.rng import PrivateStream, secret_key
from privfed.schedule import ClientConfig
from privfed.tuning.layout import layout_of, read_flat
from privfed.types import EVERYONE, PrivacyEvent, Shard
from privfed_attacks.sealed import Sealed, unseal
from privfed_audits.bounds import gdp_epsilon
from privfed_audits.canary_scores import along, scores_of, spread_of
from privfed_audits.claims import Claim
from privfed_audits.mutants import HEAD
from privfed_audits.verdict import Choice, choose, rejects

Floats = NDArray[np.float64]
Bits = NDArray[np.bool_]
DELTA = 1e-5
CLIP = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large the audits are.

    Attributes:
        canaries: Of ``step``, ``rounds`` and ``clients``.
        rounds: Of ``rounds``.
        lonely: Clients of ``lonely``.
        lonely_rounds: Rounds of ``lonely``.
    """

    canaries: int = 3000
    rounds: int = 6
    lonely: int = 240
    lonely_rounds: int = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What an audit of one build found.

    Attributes:
        rejected: Whether the lower bound exceeds the claim.
        epsilon: The lower bound for a Gaussian mechanism.
        attack: The best attack.
    """

    rejected: bool
    epsilon: float
    attack: str


class Body(nn.Module):
    """A body and a head: two layers.

    Args:
        width: Of features and hidden layer; there are three quarters as many classes.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Linear(width, width)
        self.classifier = nn.Linear(width, 3 * width // 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        logits: torch.Tensor = self.classifier(torch.tanh(self.body(x)))
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A model, ordinary examples, canaries, their coins and a plan for the claim."""

    module: Body
    examples: PlantedExamples
    given: GivenGradients
    ordinary: int
    truth: Sealed[Bits]
    plan: Plan
    key: bytes = field(repr=False)

    def trainer(self, probability: float) -> LocalTrainer:
        """Return the shipped trainer, one plain step a round."""
        config = ClientConfig(
            optimizer="sgd",
            learning_rate=0.1,
            sampling_probability=probability,
            local_steps=1,
            physical_batch_size=128,
        )
        dp = ExampleDp(l2_clip_norm=CLIP, noise_multiplier=self.plan.noise_multiplier)
        return LocalTrainer(self.module, HEAD, self.examples, config, dp)

    def claim(self) -> Claim:
        """Return what is claimed."""
        events = next(iter(self.plan.events_by_client.values()))
        return Claim(view="individual", epsilon=self.plan.epsilon, delta=DELTA, unit=events[0].unit, events=events)


def bench(
    *, epsilon: float, canaries: int, ordinary: int, rounds: int, probability: float, seed: int, width: int = 64
) -> Bench:
    """Return everything an audit of the example level needs, planned for ``epsilon``.

    Model and ordinary examples follow from the seed; coins, batches and noise do not.
    """
    draw = torch.Generator().manual_seed(seed)
    module = Body(width)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / 8)
    inner = FeatureExamples(torch.randn(ordinary, width, generator=draw), torch.arange(ordinary) % (3 * width // 4))
    given = given_gradients(layout_of(module), canaries, CLIP, np.random.default_rng(seed))
    privacy = PrivacyConfig(target_epsilon=epsilon, target_delta=DELTA, l2_clip_norm=CLIP)
    phase = PhasePlan(
        name="train", rounds=rounds, cohort_size=1, clients=1, local_steps=1, probabilities={"a": probability}
    )
    plan = make_plan(privacy, [phase], masks=None)
    if plan is None:
        raise ConfigError("An audit of noise needs a plan with noise.")
    return Bench(
        module=module,
        examples=PlantedExamples(inner, ordinary, given),
        given=given,
        ordinary=ordinary,
        truth=Sealed(_coins(canaries)),
        plan=plan,
        key=secret_key(),
    )


def step(*, epsilon: float, size: Size, seed: int) -> Outcome:
    """Audit one step on all records."""
    return _rounds(epsilon=epsilon, canaries=size.canaries, rounds=1, probability=1.0, seed=seed)


def rounds(*, epsilon: float, size: Size, seed: int) -> Outcome:
    """Audit several steps on Poisson samples."""
    return _rounds(epsilon=epsilon, canaries=size.canaries, rounds=size.rounds, probability=0.5, seed=seed)


def _rounds(*, epsilon: float, canaries: int, rounds: int, probability: float, seed: int) -> Outcome:
    own = bench(epsilon=epsilon, canaries=canaries, ordinary=16, rounds=rounds, probability=probability, seed=seed)
    layout, trainer = layout_of(own.module), own.trainer(probability)
    inside = own.ordinary + np.flatnonzero(unseal(own.truth))
    shard = Shard(client_id="a", indices=np.concatenate([np.arange(own.ordinary), inside]))
    params_D, along_R, spread_R = read_flat(own.module), [], []
    try:
        for number in range(rounds):
            update_D = trainer.run(params_D, shard, PrivateStream(own.key, "round", number), lambda *_: None)
            along_R.append(along(update_D, own.given))
            spread_R.append(spread_of(update_D, own.given, layout))
            params_D = params_D + update_D
    finally:
        trainer.close()
    return _judged(scores_of(np.array(along_R), np.array(spread_R)), own.truth, own.claim())


def lonely(*, epsilon: float, size: Size, seed: int) -> Outcome:
    """Audit whether a client of one ordinary record shows that its batch was empty."""
    probability = 0.5
    own = bench(
        epsilon=epsilon,
        canaries=size.lonely,
        ordinary=1,
        rounds=size.lonely_rounds,
        probability=probability,
        seed=seed,
        width=20,
    )
    trainer, params_D = own.trainer(probability), read_flat(own.module)
    scores = np.zeros(size.lonely)
    try:
        bits_M = unseal(own.truth)
        for canary, inside in enumerate(bits_M):
            rows = np.array([0, 1 + canary] if inside else [0], dtype=np.int64)
            shard = Shard(client_id=str(canary), indices=rows)
            for number in range(size.lonely_rounds):
                stream = PrivateStream(own.key, "lonely", canary, number)
                scores[canary] += bool(np.any(trainer.run(params_D, shard, stream, lambda *_: None)))
    finally:
        trainer.close()
    return _judged({"moved": scores}, own.truth, own.claim())


class _Keeper:
    """A data holder with streams and no ledger: an audit of the mechanism alone charges nothing."""

    def __init__(self) -> None:
        self._key = secret_key()
        self._digests: dict[tuple[str, str, int], str] = {}

    def stream(self, *names: str | int) -> PrivateStream:
        """Return a private stream."""
        return PrivateStream(self._key, *names)

    def charge(self, client_id: str, phase: str, round_number: int, input_digest: str, event: PrivacyEvent) -> None:
        """Note the input."""
        del event
        self._digests.setdefault((client_id, phase, round_number), input_digest)

    def recorded(self, client_id: str, phase: str, round_number: int) -> str | None:
        """Return the input of a round's first charge."""
        return self._digests.get((client_id, phase, round_number))


def clients(*, epsilon: float, size: Size, seed: int) -> Outcome:
    """Audit a round of client-level privacy in which all clients take part."""
    layout, truth = layout_of(Body()), Sealed(_coins(size.canaries))
    given = given_gradients(layout, size.canaries, CLIP, np.random.default_rng(seed))
    privacy = PrivacyConfig(unit="client", target_epsilon=epsilon, target_delta=DELTA, l2_clip_norm=CLIP)
    phase = PhasePlan(
        name="train",
        rounds=1,
        cohort_size=size.canaries,
        clients=size.canaries,
        local_steps=1,
        probabilities={"a": 1.0},
    )
    plan = make_plan(privacy, [phase], masks=None)
    if plan is None:
        raise ConfigError("An audit of noise needs a plan with noise.")
    site = Site(
        plan=phase,
        noise_multiplier=plan.noise_multiplier,
        relation="add_or_remove_one",
        l2_clip_norm=CLIP,
        largest_clip=None,
        size=layout.size,
        bound=lambda clip, _length: clip,
        seed=seed,
    )
    mechanism = built(privacy.mechanism).at_work(site)
    sum_D = np.zeros(layout.size)
    for canary in np.flatnonzero(unseal(truth)):
        update_D = np.zeros(layout.size, dtype=np.float32)
        update_D[given.flat_M[canary]] = -np.sign(given.values_M[canary]) * BEYOND * CLIP
        sum_D += mechanism.bounded(update_D, ())[0]
    moment = Moment(phase="train", round=1, broadcast=b"")
    mean_D = mechanism.release(sum_D, moment, _Keeper(), {}).mean_D
    if mean_D is None:
        raise ConfigError("The round was lost.")
    events = plan.events_by_client[EVERYONE]
    claim = Claim(view="release", epsilon=plan.epsilon, delta=DELTA, unit="client", events=events)
    return _judged(scores_of(along(mean_D, given)[None], spread_of(mean_D, given, layout)[None]), truth, claim)


AUDITS: dict[str, Callable[..., Outcome]] = {"step": step, "rounds": rounds, "lonely": lonely, "clients": clients}


def rejections(audit: str, *, epsilon: float, size: Size, seeds: Sequence[int]) -> list[Outcome]:
    """Return the outcome of an audit for each seed, of whatever build is in place."""
    return [AUDITS[audit](epsilon=epsilon, size=size, seed=seed) for seed in seeds]


def _judged(scores: dict[str, Floats], truth: Sealed[Bits], claim: Claim, alpha: float = 0.05) -> Outcome:
    chosen: Choice = choose(scores, unseal(truth), DELTA, alpha, np.random.default_rng(0))
    found = gdp_epsilon(chosen.counts, delta=DELTA, alpha=alpha).epsilon
    return Outcome(rejected=rejects(chosen.counts, claim, alpha), epsilon=found, attack=chosen.attack)


def _coins(count: int) -> Bits:
    """Return fair coins from the operating system."""
    return PrivateStream(secret_key(), "coins").bernoulli(0.5, count)
