"""From a configuration and its data to a model with its tuning, and its examples: what phases train on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from privfed.config import RunConfig
from privfed.data import AnySplit
from privfed.data.canaries import CANARIES
from privfed.data.dataset import taken
from privfed.errors import ModelError
from privfed.federation.canaries import canaries_of
from privfed.federation.material import Material
from privfed.federation.phases import TRAIN, WARM_START, phases
from privfed.federation.planted import (
    Given,
    PlantedExamples,
    example_gradients,
    given_gradients,
    optimised_directions,
    random_directions,
)
from privfed.federation.shared import NOTHING, SharedWork
from privfed.models.examples import Examples, FeatureExamples, LabelledExamples, ModelExamples
from privfed.models.language import LanguageExamples, packs_are_apart
from privfed.models.loading import LoadedModel
from privfed.models.prefix import attach, find_prefix
from privfed.rng import experiment_rng, experiment_seed
from privfed.tuning import TUNINGS, TunedModel
from privfed.tuning.layout import layout_of
from privfed.types import Float32, ParamLayout

if TYPE_CHECKING:
    from privfed.federation.progress import Progress

# no tensor's name starts like this
_NO_HEAD = " "
MOCK_RECORDS, MOCK_VALUES = 64, 1 << 26  # of optimised canaries: records at most, and values of their gradients


@dataclass(frozen=True, slots=True, kw_only=True)
class Workbench:
    """Model and examples, ready to train.

    Attributes:
        planted: The training examples with canaries of given gradients behind them; None without such canaries.
        packing: What the receipt says of records that share a sequence; empty where none do.
        scored: Whether test examples are scored here; where they are not, nothing is computed from them.
    """

    loaded: LoadedModel
    tuned: TunedModel
    train: ModelExamples
    test: ModelExamples
    planted: PlantedExamples | None = None
    packing: str = ""
    shared: SharedWork = NOTHING
    scored: bool = True


def build(
    config: RunConfig, material: Material, progress: Progress, shared: SharedWork = NOTHING, *, scored: bool = True
) -> Workbench:
    """Load the model, apply the tuning, make the examples.

    Args:
        config: The run.
        material: Its data.
        progress: Told what takes long.
        shared: What other runs have computed already.
        scored: Whether test examples are scored in this process; a data holder's site scores none.

    Raises:
        ModelError: If the model or the tuning does not fit.
    """
    loaded, tuned = load_tuned(config, material, shared)

    def examples(split: AnySplit) -> ModelExamples:
        found: ModelExamples = shared.examples(split, material.dataset.kind, loaded, config.model)
        return found

    bench = Workbench(
        loaded=loaded,
        tuned=tuned,
        train=examples(material.dataset.train),
        test=examples(material.dataset.test),
        shared=shared,
        scored=scored,
    )
    if config.model.packing and isinstance(bench.train, LanguageExamples):
        bench = replace(bench, packing=_packing(bench, progress))
    elif config.model.dropout == 0.0 and not config.model.gradient_checkpointing:  # which is to save memory, not time
        _cache_frozen(bench, config.model.cache_frozen_gib, progress)
    if material.canaries is None or material.canaries.loss == "model":
        return bench
    return replace(bench, planted=planted(config, bench, material))


def _packing(bench: Workbench, progress: Progress) -> str:
    """Return what is true of records that share a sequence in this model, as the receipt says it; tried out here.

    Raises:
        ModelError: If the model cannot be trained on such sequences.
    """
    if isinstance(bench.train, LanguageExamples) and packs_are_apart(bench.tuned.model, bench.train):
        return "Records were packed into shared sequences and did not see each other."
    note = (
        "Records were packed into shared sequences, in which this model lets each see those before it (all of one "
        "client): its losses in training are not those of records alone."
    )
    progress.message(f"Warning: {note}")
    return note


def planted(config: RunConfig, bench: Workbench, material: Material) -> PlantedExamples:
    """Return the training examples with the canaries' given gradients.

    Raises:
        ConfigError: If there are no canaries.
        ModelError: If there are more canaries than values for them.
    """
    gradients = given_of(config, layout_of(bench.tuned.model), material, bench.shared)
    return PlantedExamples(bench.train, int(canaries_of(material).rows_M[0]), gradients)


def given_of(config: RunConfig, layout: ParamLayout, material: Material, shared: SharedWork = NOTHING) -> Given:
    """Return the gradients that a run's canaries are given; they follow from its seed and public parts, no secret.

    Raises:
        ConfigError: If there are no canaries.
        ModelError: If there are more canaries than values for them.
    """
    canaries = canaries_of(material)
    rng, clip = experiment_rng(config.seed, "canaries", "values"), config.privacy.l2_clip_norm
    kind = CANARIES.get(canaries.kind)
    if kind.gradient == "optimised":
        return optimised_directions(layout, len(canaries), clip, rng, _mock_gradients(config, material, shared))
    make = random_directions if kind.gradient == "random" else given_gradients
    return make(layout, len(canaries), clip, rng)


def _mock_gradients(config: RunConfig, material: Material, shared: SharedWork) -> Float32:
    """Return the gradients of some test records at the model that training starts from [K, D]."""
    loaded, tuned = load_tuned(config, material, shared)
    split, size = material.dataset.test, layout_of(tuned.model).size
    count = max(1, min(MOCK_RECORDS, MOCK_VALUES // size, len(split)))
    rows = np.unique(np.linspace(0, len(split) - 1, count).astype(np.int64))
    examples: ModelExamples = shared.examples(taken(split, rows), material.dataset.kind, loaded, config.model)
    return example_gradients(tuned.model, examples)


def load_tuned(config: RunConfig, material: Material, shared: SharedWork = NOTHING) -> tuple[LoadedModel, TunedModel]:
    """Load the model and apply the tuning.

    Raises:
        ModelError: If the model or the tuning does not fit.
    """
    seed = experiment_seed(config.seed, "init") % (1 << 31)
    loaded: LoadedModel = shared.model(config.model, material.dataset.label_names, seed)
    tuning = TUNINGS.get(str(getattr(config.tuning, "name", None)))
    return loaded, tuning.apply(loaded, config.tuning, seed)


def trained_lengths(config: RunConfig, tuned: TunedModel) -> dict[str, int]:
    """Return how many values a client sends in each phase, where all that is trained is sent."""
    lengths = {name: layout_of(tuned.model).size for name, _, _ in phases(config)}
    if WARM_START in lengths:
        lengths[WARM_START] = layout_of(trained_head(tuned)).size
    return lengths


def planned_lengths(config: RunConfig, material: Material) -> dict[str, int]:
    """Return :func:`trained_lengths` of a run that is not set up: loads the model, tokenises no text.

    Raises:
        ModelError: If the model or the tuning does not fit.
    """
    return trained_lengths(config, load_tuned(config, material)[1])


def trained_module(
    config: RunConfig, bench: Workbench, name: str, progress: Progress
) -> tuple[nn.Module, Examples, Examples, str | None]:
    """Return what trains in a phase: (module, training examples, test examples, prefix of the head's names)."""
    only_head = getattr(config.tuning, "name", "") == "head"
    place: str | None = bench.tuned.head
    if name == TRAIN and not only_head:
        return bench.tuned.model, bench.planted or bench.train, bench.test, place
    if place is None:
        raise ModelError(
            "head_warm_start trains the task's head first, and a causal language model has none of its own: "
            'set head_warm_start.name = "none".'
        )
    train, test = _features(bench, progress)
    if train is not None and test is not None:
        return trained_head(bench.tuned), _with_planted(train, bench), test, ""
    if only_head:
        return bench.tuned.model, bench.planted or bench.train, bench.test, place
    raise ModelError(
        "head_warm_start needs a model whose head gets one vector an example, and this one's gets every token: "
        'set head_warm_start.name = "none".'
    )


def _with_planted(train: Examples, bench: Workbench) -> Examples:
    """Return the examples with the given gradients of canaries, where there are any."""
    if bench.planted is None:
        return train
    return PlantedExamples(train, bench.planted.first_direct, bench.planted.gradients)


def trained_head(tuned: TunedModel) -> nn.Module:
    """Return the head that is trained: peft keeps it beside a frozen copy of the original.

    Raises:
        ModelError: If the model has none.
    """
    if tuned.head is None:
        raise ModelError("This model has no classification head to train: choose another tuning.")
    head = tuned.model.get_submodule(tuned.head)
    copies = getattr(head, "modules_to_save", None)
    return head if copies is None else copies["default"]


def _features(bench: Workbench, progress: Progress) -> tuple[FeatureExamples | None, FeatureExamples | None]:
    train, test = bench.train, bench.test
    if bench.tuned.head is None or not (isinstance(train, LabelledExamples) and isinstance(test, LabelledExamples)):
        return None, None
    count = len(train) + (len(test) if bench.scored else 0)
    progress.message(f"Features of {count} examples from the frozen model")
    model, head, shared = bench.tuned.model, bench.tuned.head, bench.shared
    found = shared.features(model, head, train)
    if found is None or bench.scored:
        return found, shared.features(model, head, test)
    return found, FeatureExamples(found.features_NF[:0], found.labels[:0])


def _cache_frozen(bench: Workbench, gib: float, progress: Progress) -> None:
    """Run frozen first blocks once over all examples, where there are any and their output fits.

    The limit is fixed in the configuration: free memory would let a resumed run choose otherwise, and padding then
    changes the last bits. For the same reason it counts test examples where they are not scored, too.
    """
    head: str | None = bench.tuned.head
    prefix = find_prefix(bench.tuned.model, _NO_HEAD if head is None else head)
    width = int(getattr(bench.tuned.model.config, "hidden_size", 0))
    needed = 4 * width * int(bench.train.lengths.sum() + bench.test.lengths.sum())
    if prefix is None or needed > gib * 2**30:
        return
    splits = (bench.train, bench.test) if bench.scored else (bench.train,)
    kept = 4 * width * sum(int(each.lengths.sum()) for each in splits)
    progress.message(f"Running the frozen blocks once over all examples ({kept / 2**20:.0f} MiB kept)")
    model, shared = bench.tuned.model, bench.shared
    if not attach(model, prefix, *splits, states=lambda each: shared.states(prefix, model, each, head)):
        progress.message("The frozen blocks' output cannot be replayed in this model: running it whole")
