"""From a configuration and its data to phases that are ready to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from privfed.compression import CODECS, Codec, Ring
from privfed.config import RunConfig
from privfed.errors import ConfigError, ModelError
from privfed.federation.client import Client, Holder
from privfed.federation.local import ExampleDp, LocalTrainer
from privfed.federation.material import Material, plans
from privfed.federation.phases import TRAIN, phases
from privfed.federation.round import CentralNoise, Phase
from privfed.models.examples import Examples, TextExamples, head_features
from privfed.models.loading import LoadedModel, load_model
from privfed.models.prefix import attach, find_prefix
from privfed.privacy.plan import PhasePlan, Plan
from privfed.rng import experiment_seed
from privfed.schedule import ServerConfig
from privfed.secagg import Identity
from privfed.tuning import TUNINGS, TunedModel
from privfed.tuning.layout import layout_of
from privfed.types import PrivacyEvent

if TYPE_CHECKING:
    from privfed.federation.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Workbench:
    """Model and examples, ready to train."""

    loaded: LoadedModel
    tuned: TunedModel
    train: TextExamples
    test: TextExamples


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One phase ready to run: the module that trains, its examples, and the phase itself."""

    module: nn.Module
    train: Examples
    test: Examples
    trainer: LocalTrainer
    phase: Phase


def build(config: RunConfig, material: Material, progress: Progress) -> Workbench:
    """Load the model, apply the tuning, tokenise the texts.

    Raises:
        ModelError: If the model or the tuning does not fit.
    """
    seed = experiment_seed(config.seed, "init") % (1 << 31)
    loaded = load_model(config.model, label_names=material.dataset.label_names, seed=seed)
    tuning = TUNINGS.get(str(getattr(config.tuning, "name", None)))
    tuned = tuning.apply(loaded, config.tuning, seed)

    def examples(split: Any) -> TextExamples:
        return TextExamples(split.texts, split.labels, loaded.tokenizer, config.model.max_length)

    bench = Workbench(
        loaded=loaded,
        tuned=tuned,
        train=examples(material.dataset.train),
        test=examples(material.dataset.test),
    )
    if config.model.dropout == 0.0:
        _cache_frozen(bench, config.model.cache_frozen_gib, progress)
    return bench


def make_stages(
    config: RunConfig,
    material: Material,
    bench: Workbench,
    plan: Plan | None,
    holder: Holder,
    progress: Progress,
) -> dict[str, Stage]:
    """Return the run's phases in order: the head alone on cached features where asked for, then the tuning."""
    stages = {}
    for (name, client, server), phase_plan in zip(phases(config), plans(config, material), strict=True):
        module, train, test, prefix = _module(config, bench, name, progress)
        dp = None
        if plan is not None and config.privacy.unit == "example":
            dp = ExampleDp(
                l2_clip_norm=config.privacy.l2_clip_norm,
                noise_multiplier=plan.noise_multiplier * phase_plan.noise_scale,
            )
        trainer = LocalTrainer(module, prefix, train, client, dp)
        phase = _phase(config, material, phase_plan, server, trainer, plan, holder)
        stages[name] = Stage(module=module, train=train, test=test, trainer=trainer, phase=phase)
    return stages


def trained_values(config: RunConfig, material: Material) -> int:
    """Return D, the number of values that the main phase trains, without tokenising any text.

    Raises:
        ModelError: If the model or the tuning does not fit.
    """
    seed = experiment_seed(config.seed, "init") % (1 << 31)
    loaded = load_model(config.model, label_names=material.dataset.label_names, seed=seed)
    tuned = TUNINGS.get(str(getattr(config.tuning, "name", None))).apply(loaded, config.tuning, seed)
    only_head = getattr(config.tuning, "name", "") == "head"
    return layout_of(trained_head(tuned) if only_head else tuned.model).size


def trained_head(tuned: TunedModel) -> nn.Module:
    """Return the head that is trained: peft keeps it beside a frozen copy of the original."""
    head = tuned.model.get_submodule(tuned.head)
    copies = getattr(head, "modules_to_save", None)
    return head if copies is None else copies["default"]


def _cache_frozen(bench: Workbench, gib: float, progress: Progress) -> None:
    """Run frozen first blocks once over all texts, where there are any and their output fits.

    The limit is fixed in the configuration: free memory would let a resumed run choose otherwise, and padding then
    changes the last bits.
    """
    prefix = find_prefix(bench.tuned.model, bench.tuned.head)
    width = int(getattr(bench.tuned.model.config, "hidden_size", 0))
    needed = 4 * width * int(bench.train.lengths.sum() + bench.test.lengths.sum())
    if prefix is None or needed > gib * 2**30:
        return
    progress.message(f"Running the frozen blocks once over all texts ({needed / 2**20:.0f} MiB kept)")
    if not attach(bench.tuned.model, prefix, bench.train, bench.test):
        progress.message("The frozen blocks' output cannot be replayed in this model: running it whole")


def _module(
    config: RunConfig, bench: Workbench, name: str, progress: Progress
) -> tuple[nn.Module, Examples, Examples, str]:
    """Return what trains in a phase: (module, training examples, test examples, prefix of the head's names)."""
    only_head = getattr(config.tuning, "name", "") == "head"
    if name == TRAIN and not only_head:
        return bench.tuned.model, bench.train, bench.test, bench.tuned.head
    head = bench.tuned.model.get_submodule(bench.tuned.head)
    progress.message(f"Features of {len(bench.train) + len(bench.test)} examples from the frozen model")
    train = head_features(bench.tuned.model, head, bench.train)
    test = head_features(bench.tuned.model, head, bench.test)
    if train is not None and test is not None:
        return trained_head(bench.tuned), train, test, ""
    if only_head:
        return bench.tuned.model, bench.train, bench.test, bench.tuned.head
    raise ModelError(
        "head_warm_start needs a model whose head gets one vector an example, and this one's gets every token: "
        'set head_warm_start.name = "none".'
    )


def _phase(
    config: RunConfig,
    material: Material,
    phase_plan: PhasePlan,
    server: ServerConfig,
    trainer: LocalTrainer,
    plan: Plan | None,
    holder: Holder,
) -> Phase:
    masked = config.secagg.name == "masked"
    if masked and config.privacy.unit != "client":  # a cohort drawn at random is looked at when it is drawn
        config.secagg.requirements().least_survivors(phase_plan.cohort_size)
    plugin = CODECS.get(str(getattr(config.compression, "name", None)))
    most = phase_plan.clients if config.privacy.unit == "client" else phase_plan.cohort_size
    ring_bits = config.ring_bits(most)
    codec = plugin.build(config.compression, Ring(bits=ring_bits, clients=most) if masked else None)
    layout = layout_of(trainer.module)
    largest = max(len(shard) for shard in material.shards)
    clip = config.privacy.l2_clip_norm if config.privacy.unit == "client" else None
    clients = {
        shard.client_id: Client(
            shard=shard,
            trainer=trainer,
            codec=codec,
            holder=holder,
            layout_digest=layout.digest,
            size=layout.size,
            event=_participation(config, phase_plan, shard.client_id, plan),
            clip=clip,
            weight=_weight(len(shard), largest) if config.server.weighting == "examples" else 1.0,
        )
        for shard in material.shards
    }
    return Phase(
        plan=phase_plan,
        server=server,
        clients=clients,
        codec=codec,
        codec_name=str(getattr(config.compression, "name", "")),
        layout=layout,
        masked=masked,
        requirements=config.secagg.requirements(),
        ring_bits=ring_bits,
        identities=_identities(material, holder) if masked else {},
        weighted=config.server.weighting == "examples",
        central=_central(config, phase_plan, plan, codec, layout.size),
        poisson_clients=config.privacy.unit == "client",
        seed=config.seed,
        config_digest=config.digest(),
    )


def _identities(material: Material, holder: Holder) -> dict[str, Identity]:
    """Return the signing keys that the holder gives its clients for this run; a resumed run has the same."""
    names = [shard.client_id for shard in material.shards]
    return {name: Identity.from_seed(holder.stream("identity", name).bytes(32)) for name in names}


def _weight(size: int, largest: int) -> float:
    """Return n / n_max on the 16-bit grid on which weights travel, never 0."""
    return max(1, round(size / largest * (1 << 16))) / (1 << 16)


def _participation(config: RunConfig, phase: PhasePlan, client: str, plan: Plan | None) -> PrivacyEvent | None:
    if plan is None or config.privacy.unit != "example":
        return None
    return PrivacyEvent(
        unit="example",
        noise_multiplier=plan.noise_multiplier * phase.noise_scale,
        sampling_probability=phase.probabilities[client],
        steps=phase.local_steps,
        relation=config.privacy.neighboring_relation,
    )


def _central(config: RunConfig, phase: PhasePlan, plan: Plan | None, codec: Codec, size: int) -> CentralNoise | None:
    """Return the server's noise under client level.

    One client changes the decoded sum by at most the codec's bound on its clipped update (times 2 where a client is
    replaced, which the accountant's relation covers).

    Raises:
        ConfigError: If the codec gives no bound.
    """
    if plan is None or config.privacy.unit != "client":
        return None
    bound = codec.l2_bound(config.privacy.l2_clip_norm, size)
    if bound is None:
        raise ConfigError(
            f"compression.name = {getattr(config.compression, 'name', None)!r} gives no bound on the encoded update, "
            'which privacy.unit = "client" needs: use compression.name = "identity".'
        )
    event = PrivacyEvent(
        unit="client",
        noise_multiplier=plan.noise_multiplier * phase.noise_scale,
        sampling_probability=phase.cohort_size / phase.clients,
        steps=1,
        relation=config.privacy.neighboring_relation,
    )
    return CentralNoise(event=event, sensitivity=bound, noise_multiplier=event.noise_multiplier)


def set_deterministic() -> None:
    """Keep torch deterministic: a resumed run must equal an unbroken one to the bit."""
    torch.use_deterministic_algorithms(True)
