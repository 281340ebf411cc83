"""What an adversary of a run with canaries can say of each: scores by view and attack, from what that view shows.

Nothing here reads a coin: the data set is rebuilt with every canary and with none of them in a client's data.

Shape suffixes: R observations, M canaries, Q queries, D trained values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from privfed.config import RunConfig
from privfed.data.dataset import taken
from privfed.errors import ConfigError
from privfed.federation import workbench
from privfed.federation.canaries import Canaries, canaries_of, expected
from privfed.federation.checkpoint import load_checkpoint
from privfed.federation.local import ExampleDp, LocalTrainer
from privfed.federation.material import Material
from privfed.federation.pairs import write_named
from privfed.federation.phases import TRAIN
from privfed.federation.planted import Given
from privfed.federation.progress import Silent
from privfed.federation.shared import NOTHING, SharedWork
from privfed.federation.state import ServerState
from privfed.federation.transcript import Transcript
from privfed.rng import PrivateStream
from privfed.tuning.layout import layout_of, read_flat, write_flat
from privfed.types import Float32, Shard, View
from privfed_attacks.gather import example_losses, query_gradients, token_evidence
from privfed_attacks.membership import MEMBERSHIP, Evidence
from privfed_attacks.membership.gradient_dot import unit
from privfed_attacks.observation import Observation, Role, ThreatModel
from privfed_attacks.public_model import write_tensors
from privfed_audits.canary_scores import along, scores_of, spread_of

Floats = NDArray[np.float64]
MOST_GRADIENTS = 20_000
"""So many gradients of canaries are computed at most; of longer runs, rounds spread evenly are looked at."""
_PASS_BYTES = 1 << 27
_POPULATION = 2000
Say = Callable[[str], None]


@dataclass(slots=True, kw_only=True)
class Scene:
    """A run, as its auditor rebuilds it.

    Attributes:
        material: The data; with every canary, where there are any, and none of them in a client's.
        transcript: What was recorded, or None.
        sizes: Examples of each client, which are public.
        queries: Rows of the training split that are asked about.
        shared: What other runs have computed already.
    """

    folder: Path
    config: RunConfig
    material: Material
    transcript: Transcript | None
    sizes: Mapping[str, int]
    queries: NDArray[np.int64] = field(repr=False)
    shared: SharedWork = NOTHING
    _few: list[workbench.Workbench] = field(default_factory=list)
    _parts: list[tuple[nn.Module, Any, Any]] = field(default_factory=list)
    _start: list[tuple[nn.Module, Float32]] = field(default_factory=list)

    @property
    def canaries(self) -> Canaries:
        """The canaries, without their coins."""
        return canaries_of(self.material)

    def few(self) -> workbench.Workbench:
        """Return the model, the queries and the population as examples; made once."""
        if not self._few:
            data: Any = self.material.dataset
            some = np.unique(np.linspace(0, len(data.test) - 1, min(_POPULATION, len(data.test))).astype(np.int64))
            few = replace(data, train=taken(data.train, self.queries), test=taken(data.test, some))
            material = replace(self.material, dataset=few, canaries=None)
            self._few.append(workbench.build(self.config, material, Silent(), self.shared))
        return self._few[0]

    def few_parts(self) -> tuple[nn.Module, Any, Any]:
        """Return (what trains in the last phase, the queries, the population); made once, features and all."""
        if not self._parts:
            self._parts.append(workbench.trained_module(self.config, self.few(), TRAIN, Silent())[:3])
        return self._parts[0]

    def start(self) -> tuple[nn.Module, Float32]:
        """Return the tuned model and its trained values as the run starts from them [D]."""
        if not self._start:
            model = workbench.load_tuned(self.config, self.material, self.shared)[1].model
            self._start.append((model, read_flat(model)))
        return self._start[0]

    def final(self) -> ServerState:
        """Return the server's state at the end.

        Raises:
            ConfigError: If the run is not finished.
        """
        checkpoint = load_checkpoint(self.folder / "checkpoint" / "state.safetensors")
        if checkpoint is None:
            raise ConfigError(f"The run in {self.folder} has no checkpoint: finish it with `privfed train --resume`.")
        return checkpoint.state


def canary_scene(
    folder: Path,
    config: RunConfig,
    transcript: Transcript | None,
    sizes: Mapping[str, int],
    shared: SharedWork = NOTHING,
) -> Scene:
    """Return the scene of a run with canaries."""
    material = expected(config, shared)
    if material.canaries is None:
        raise ConfigError("This run has no canaries.")
    rows = material.canaries.rows_M
    return Scene(
        folder=folder,
        config=config,
        material=material,
        transcript=transcript,
        sizes=sizes,
        queries=rows,
        shared=shared,
    )


def views_of(scene: Scene) -> tuple[View, ...]:
    """Return the views that there is something to attack in."""
    if scene.transcript is None:
        return ("release",)
    return ("aggregate", "release") if scene.transcript.masked else ("individual", "aggregate", "release")


def attacks_of(scene: Scene, view: View, say: Say) -> dict[str, Callable[[], Mapping[str, Floats]]]:
    """Return what computes scores, by the name under which they are kept; each gives scores by attack."""
    found: dict[str, Callable[[], Mapping[str, Floats]]] = {}
    if scene.canaries.loss == "direct":
        found["values"] = lambda: _direct(scene, view, say)
        return found
    if scene.transcript is not None:
        found["gradients"] = lambda: _gradients(scene, view, say)
    if view == "release":
        found["losses"] = lambda: _losses(scene)
    return found


def _direct(scene: Scene, view: View, say: Say) -> dict[str, Floats]:
    """Return scores of canaries with given gradients: they are read off the updates."""
    model, start_D = scene.start()
    layout = layout_of(model)
    given = workbench.given_of(scene.config, layout, scene.material, scene.shared)
    if scene.transcript is None:
        change_D = scene.final().params_D - start_D  # all that a run without a transcript shows of its training
        return scores_of(along(change_D, given)[None], spread_of(change_D, given, layout)[None])
    seen = _seen(scene, view)
    found = scores_of(*_projected(seen, given, scene.canaries.owners_M))
    known = _known(scene, view, say)
    if known is not None:
        rest = [replace(each, payload=_minus(each, known_D)) for each, known_D in zip(seen, known, strict=True)]
        own = scores_of(*_projected(rest, given, scene.canaries.owners_M))
        found |= {f"{name}_rest_known": values for name, values in own.items()}
    return found


def _projected(seen: Sequence[Observation], given: Given, owners_M: Sequence[str]) -> tuple[Floats, Floats]:
    """Return (along_RM, spread_RM) with one row a round; a client's update is seen along its own canaries only."""
    numbers = sorted({each.round for each in seen})
    along_RM = np.full((len(numbers), len(given)), np.nan)
    spread_RM = np.ones_like(along_RM)
    owners = np.array(owners_M)
    for each in seen:
        row, update_D = numbers.index(each.round), each.flat()
        own = np.arange(len(owners)) if each.source is None else np.flatnonzero(owners == each.source)
        along_RM[row, own] = along(update_D, given, own)
        spread_RM[row, own] = spread_of(update_D, given, each.layout)[own]
    return along_RM, spread_RM


def _seen(scene: Scene, view: View) -> tuple[Observation, ...]:
    """Return what this view shows of the last phase.

    Raises:
        ConfigError: If the run was not recorded, or nothing was seen.
    """
    if scene.transcript is None:
        raise ConfigError(f"The view {view} needs a recorded run: train with -s audit.record=true.")
    role: Role = "client" if view == "release" else "server"
    found = ThreatModel(role=role, observes=view).view(scene.transcript).of(TRAIN)
    if not found:
        raise ConfigError(f"The recorded run has no round that shows anything to the view {view}.")
    return found


def _minus(observation: Observation, known_D: Floats) -> dict[str, Float32]:
    rest_D = (observation.flat().astype(np.float64) - known_D).astype(np.float32)
    parts = np.split(rest_D, np.cumsum(observation.layout.sizes)[:-1])
    shapes = zip(observation.layout.names, observation.layout.shapes, parts, strict=True)
    return {name: part.reshape(shape) for name, shape, part in shapes}


def _known(scene: Scene, view: View, say: Say) -> list[Floats] | None:
    """Return what the ordinary records moved, by observation, where that can be said: the strongest adversary knows it.

    With one plain step of SGD a round it is minus the rate times the expected sum of their clipped gradients over the
    expected batch, at the parameters that were broadcast. None where clients train otherwise.
    """
    config = scene.config
    client, server = config.client, config.server
    plain = client.optimizer == "sgd" and client.local_steps == 1 and not client.momentum and not client.proximal_mu
    averaged = server.rule == "fedavg" and server.weighting == "uniform" and server.optimizer == "sgd"
    if config.privacy.unit != "example" or not plain or not averaged or server.momentum or scene.transcript is None:
        return None
    bench = workbench.build(config, replace(scene.material, canaries=None), Silent(), scene.shared)
    module, train, _, prefix = workbench.trained_module(config, bench, TRAIN, Silent())
    whole = client.model_copy(update={"sampling_probability": 1.0, "batch_size": None})
    dp = ExampleDp(l2_clip_norm=config.privacy.l2_clip_norm, noise_multiplier=None)
    trainer = LocalTrainer(module, prefix, train, whole, dp)
    rates_D = trainer.rates(layout_of(module))
    shards = {shard.client_id: shard for shard in scene.material.shards}
    found: list[Floats] = []
    try:
        for record in scene.transcript.rounds(TRAIN):
            if record.lost is not None and view == "aggregate":
                continue
            say(f"{view}, round {record.round}: what the ordinary records move")
            params_D = _flat(scene.transcript.params(record), module)
            names = record.clients if view == "individual" else record.survivors
            sums = {name: _sum(trainer, params_D, shards.get(name)) for name in names}
            q = {name: client.probability(scene.sizes[name]) for name in sums}
            batch = {name: client.expected_batch(scene.sizes[name]) for name in sums}
            if view == "individual":
                found += [-rates_D * q[name] * sums[name] / batch[name] for name in names]
            elif record.lost is not None or not names:
                found.append(np.zeros(len(rates_D)))
            elif config.privacy.is_distributed:
                moved_D = np.sum([q[n] * sums[n] for n in names], axis=0)
                found.append(-rates_D * moved_D / sum(batch.values()))
            else:
                found.append(-rates_D * np.mean([q[n] * sums[n] / batch[n] for n in names], axis=0))
    finally:
        trainer.close()
    if view == "release":
        found = [server.learning_rate * each for each in found]
    return found


def _sum(trainer: LocalTrainer, params_D: Float32, shard: Shard | None) -> Floats:
    """Return the sum of clipped gradients of a client's ordinary records [D]."""
    if shard is None or not len(shard):
        return np.zeros(len(params_D))
    return trainer.gradient_sum(params_D, shard, PrivateStream(bytes(32), "audit"), lambda *_: None)


def _flat(tensors: Mapping[str, Float32], module: nn.Module) -> Float32:
    return np.concatenate([tensors[name].ravel() for name in layout_of(module).names]).astype(np.float32)


def _gradients(scene: Scene, view: View, say: Say) -> dict[str, Floats]:
    """Return gradient-dot and cosine over rounds, with the canaries' gradients at what each round started from."""
    seen = _seen(scene, view)
    owners = np.array(scene.canaries.owners_M)
    numbers = sorted({each.round for each in seen})
    most = min(len(numbers), max(1, MOST_GRADIENTS // len(owners)))
    chosen = np.unique(np.linspace(0, len(numbers) - 1, most).astype(int)).tolist()
    dots_RM = np.full((len(numbers), len(owners)), np.nan)
    cosines_RM = dots_RM.copy()
    for each in seen:
        row = numbers.index(each.round)
        if row not in chosen:
            continue
        own = np.arange(len(owners)) if each.source is None else np.flatnonzero(owners == each.source)
        say(f"{view}, round {each.round}: gradients of {len(own)} canaries")
        dots = _dots(scene, each, own)
        dots_RM[row, own] = dots
        cosines_RM[row, own] = dots / max(float(np.linalg.norm(each.flat())), 1e-30)
    cosines_M = np.where(np.isnan(cosines_RM), 0.0, cosines_RM).sum(axis=0)
    return {**scores_of(dots_RM[chosen]), "update_cosine": cosines_M}


def _dots(scene: Scene, seen: Observation, rows: NDArray[np.int64]) -> Floats:
    """Return minus the update's component along each canary's gradient, a few at a time: whole they fill the memory."""
    module, train, _ = scene.few_parts()
    write_tensors(module, seen.params)
    update_D = seen.flat().astype(np.float64)
    size = int(max(1, min(64, _PASS_BYTES // (8 * seen.layout.size))))
    found = [np.empty(0)]
    for start in range(0, len(rows), size):
        part = Part(train, rows[start : start + size])
        found.append(-unit(query_gradients(module, part, seen.layout.names, size)) @ update_D)
    return np.concatenate(found)


def _losses(scene: Scene) -> dict[str, Floats]:
    """Return what every attack says of the queries for which the released model alone is evidence enough."""
    module, queries, population = released(scene)
    evidence = replace(asked(module, queries), population_losses_Z=example_losses(module, population))
    return {name: MEMBERSHIP.get(name).score(evidence) for name in sufficient(evidence)}


def released(scene: Scene) -> tuple[nn.Module, Any, Any]:
    """Return (the released model, the queries, the population): test records, which no client trained on."""
    module, queries, population = scene.few_parts()
    state = scene.final()
    write_flat(module, state.params_D)
    write_named(module, state.carried)
    return module, queries, population


def asked(module: nn.Module, queries: Any) -> Evidence:
    """Return what a model says of queries: losses, and of a language model the probabilities of their tokens."""
    return replace(token_evidence(module, queries), losses_Q=example_losses(module, queries))


def sufficient(evidence: Evidence) -> tuple[str, ...]:
    """Return the attacks that need no more than this evidence."""
    return tuple(name for name, attack in MEMBERSHIP.items() if not attack.missing(evidence))


class Part:
    """Some of other examples, as examples.

    Args:
        whole: The others.
        rows: Which of them.
    """

    def __init__(self, whole: Any, rows: NDArray[np.int64]) -> None:
        self._whole, self._rows = whole, rows
        self.lengths = whole.lengths[rows]

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, rows: NDArray[np.int64]) -> Any:
        """Return a batch of them."""
        return self._whole.batch(self._rows[rows])

    def losses(self, module: nn.Module, batch: Any) -> Any:
        """Return the loss of each."""
        return self._whole.losses(module, batch)

    def logits(self, module: nn.Module, batch: Any) -> Any:
        """Return the logits that the loss is over."""
        return self._whole.logits(module, batch)

    def probe(self, classes: int) -> Any:
        """Return three made-up examples."""
        return self._whole.probe(classes)
