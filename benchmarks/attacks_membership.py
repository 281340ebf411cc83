"""Membership inference against what theory says, and on adapters trained on real text.

    python benchmarks/attacks_membership.py               # all parts
    python benchmarks/attacks_membership.py theory        # one step of DP-SGD: AUC against Phi(1 / (z sqrt 2))
    python benchmarks/attacks_membership.py shadows lora  # overfitted adapters on pydoc: TPR at 1% FPR of every attack
    python benchmarks/attacks_membership.py shadows head  # the same for classifiers on the frozen model's features

*theory*: the shipped trainer takes single steps at noise multiplier z on a tiny random BERT; gradient-dot knows all
but one example's bit. For LoRA, BitFit, prompt tuning and adapters; target: within .01 of the closed form. Finished
cells are kept in benchmarks/attacks.jsonl and not run again.
*shadows*: LoRA of rank 8 on MiniLM's last block, or heads alone, on pydoc, trained side by side until they overfit;
each in turn is attacked, the others are its references. Thresholds are frozen on the even models and read on the odd
ones.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from attacks_store import STORE
from shared_work import append_row, read_rows

from privfed.models.examples import LabelledExamples, padded
from privfed.rng import experiment_rng
from privfed_attacks.roc import auc_interval, tpr_at_fpr

EXAMPLES, VOCABULARY = 16, 60
CLIP = {"lora": 0.02, "bitfit": 0.02, "adapter": 0.02, "prompt_tuning": 0.02}
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2, "target_modules": ["query", "value"]},
    "bitfit": {},
    "adapter": {"bottleneck": 4},
    "prompt_tuning": {"num_virtual_tokens": 4},
}
SCALES = (0.5, 1.0, 2.0, 4.0)
TOLERANCE = 0.01
SETTINGS: dict[str, dict[str, Any]] = {
    "head": {
        "tuning": {},
        "max_length": 64,
        "examples": 1000,
        "steps": 400,
        "client": {"optimizer": "adamw", "learning_rate": 2e-2, "batch_size": 64},
    },
    "lora": {
        "tuning": {"r": 8, "target_modules": ["query", "value"], "layers_to_transform": [5]},
        "max_length": 24,
        "examples": 500,
        "steps": 160,
        "client": {"optimizer": "adamw", "learning_rate": 3e-3, "batch_size": 16},
    },
}
TRIED = (
    ("loss", 16),
    ("population", 16),
    ("quantile", 16),
    ("reference", 16),
    ("rmia_offline", 2),
    ("rmia", 2),
    ("rmia", 16),
    ("lira_offline", 16),
    ("lira", 4),
    ("lira", 16),
    ("bavaria", 4),
    ("bavaria", 16),
)


class Tokens(LabelledExamples):
    """Random token sequences with a class each, whose gradients are nearly orthogonal."""

    def __init__(self, count: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.lengths = draw.integers(3, 9, count)
        self.rows = [draw.integers(1, VOCABULARY, length) for length in self.lengths]
        self.labels = torch.arange(count) % EXAMPLES

    def unprefixed(self, rows: Any) -> Any:
        """Return the rows padded to the longest."""
        return self.labelled(rows, padded([self.rows[row] for row in rows], 0))

    def probe(self, classes: int) -> Any:
        """Return three other sequences."""
        return Tokens(3, classes)


def tiny(name: str) -> Any:
    """Return the tuned tiny model."""
    from transformers import BertConfig, BertForSequenceClassification

    from privfed.models.loading import LoadedModel
    from privfed.models.sources import ModelSource
    from privfed.tuning import TUNINGS

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=EXAMPLES,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    source = ModelSource(location="random", local=True, origin="random", public_name="random")
    loaded = LoadedModel(model=BertForSequenceClassification(config), source=source, num_labels=EXAMPLES)
    tuning = TUNINGS.get(name)
    return tuning.apply(loaded, tuning.config(**OPTIONS[name]), 5)


def theory(steps: int) -> None:
    """Print the AUC of one step against its closed form, by tuning and noise multiplier."""
    print(f"one step, {steps} trials of {EXAMPLES} examples: AUC (closed form); fresh noise in every run")
    for name in OPTIONS:
        cells = [_theory_cell(name, z, steps) for z in SCALES]
        print(f"{name:14} {'   '.join(cells)}", flush=True)


def _theory_cell(name: str, z: float, steps: int) -> str:
    """Return one cell as text, from the store if it is there."""
    from privfed_attacks.membership.gradient_dot import theoretical_auc

    key = {"table": "theory", "cell": name, "noise_multiplier": z, "steps": steps}
    rows = [row for row in read_rows(STORE) if all(row.get(field) == value for field, value in key.items())]
    if not rows:
        area = _one_step_area(name, z, steps)
        rows = [{**key, **{field: round(getattr(area, field), 5) for field in ("value", "low", "high")}}]
        append_row(STORE, rows[0])
    found, wanted = rows[0], theoretical_auc(z)
    mark = "ok" if abs(found["value"] - wanted) <= TOLERANCE else "OFF"
    return f"z={z:g}: {found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}] ({wanted:.3f}) {mark}"


def _one_step_area(name: str, z: float, steps: int) -> Any:
    from privfed.federation.local import ExampleDp, LocalTrainer
    from privfed.rng import secret_key
    from privfed.schedule import ClientConfig
    from privfed.tuning.layout import read_flat
    from privfed.types import Shard
    from privfed_audits.one_step import one_step_trials

    tuned = tiny(name)
    config = ClientConfig(optimizer="sgd", learning_rate=0.1, sampling_probability=0.5, local_steps=1)
    dp = ExampleDp(l2_clip_norm=CLIP[name], noise_multiplier=z)
    trainer = LocalTrainer(tuned.model, tuned.head, Tokens(EXAMPLES, 1), config, dp)
    shard = Shard(client_id="a", indices=np.arange(EXAMPLES))
    found = one_step_trials(trainer, read_flat(tuned.model), shard, key=secret_key(), steps=steps)
    trainer.close()
    rng = experiment_rng(1, "bootstrap", name, str(z))
    return auc_interval(found.scores_N, found.members_N, rng, resamples=200, groups_N=found.steps_N)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overfitted:
    """Models that play the attacked one in turn: the first Q of N texts are asked about, no model saw the others."""

    losses_KN: Any
    members_KQ: Any
    labels_N: Any
    features_NF: Any


def overfitted(case: str, models: int, examples: int, steps: int) -> Overfitted:
    """Return ``models`` heads or LoRAs, each trained on half of ``examples`` texts until it overfits."""
    from privfed.data import DataConfig, load_dataset
    from privfed.models import ModelConfig
    from privfed.models.examples import head_features
    from privfed.models.loading import load_model
    from privfed.models.prefix import attach, find_prefix
    from privfed.models.tasks import build_examples
    from privfed.schedule import ClientConfig
    from privfed.tuning import TUNINGS
    from privfed_attacks.shadows import in_out_matrix, train_side_by_side

    data = load_dataset(DataConfig(name="pydoc", limit=2 * examples), seed=3)
    config = ModelConfig(name="minilm", max_length=SETTINGS[case]["max_length"])
    loaded = load_model(config, label_names=data.label_names, seed=1)
    rows: Any = build_examples(data.train, data.kind, loaded, config)
    tuning = TUNINGS.get(case)
    tuned: Any = tuning.apply(loaded, tuning.config(**SETTINGS[case]["tuning"]), 1)
    module: Any = tuned.model
    features = None
    if case == "head":
        module = tuned.model.get_submodule(tuned.head)
        rows = head_features(tuned.model, module, rows)
        features = rows.batch(np.arange(len(rows))).inputs.double().numpy()
    else:
        below: Any = find_prefix(tuned.model, tuned.head)
        assert attach(tuned.model, below, rows)
    members_KQ = in_out_matrix(models, len(rows) // 2, experiment_rng(1, "in-out"))
    seen = np.concatenate([members_KQ, np.zeros((models, len(rows) - len(rows) // 2), dtype=bool)], axis=1)
    client = ClientConfig(local_steps=steps, **SETTINGS[case]["client"])
    rngs = [experiment_rng(1, "rows", k) for k in range(models)]
    prefix = "" if case == "head" else tuned.head
    found = train_side_by_side(module, rows, seen, client, rngs, head_prefix=prefix)
    labels = np.asarray(rows.labels)
    return Overfitted(losses_KN=found.losses(rows), members_KQ=members_KQ, labels_N=labels, features_NF=features)


def shadows(case: str, models: int, examples: int | None, steps: int | None) -> None:
    """Print AUC and TPR at 1% FPR of every attack on overfitted models."""
    examples, steps = examples or SETTINGS[case]["examples"], steps or SETTINGS[case]["steps"]
    started = time.process_time()
    found = overfitted(case, models, examples, steps)
    took = time.process_time() - started
    queries = found.members_KQ.shape[1]
    inside = found.losses_KN[:, :queries][found.members_KQ].mean()
    outside = found.losses_KN[:, :queries][~found.members_KQ].mean()
    print(
        f"{case}: {models} models on {queries // 2} of {queries} pydoc texts, {steps} steps, {took:.0f} s of the "
        f"processor; mean loss of members {inside:.3f}, of others {outside:.3f}",
        flush=True,
    )
    rates: dict[tuple[str, int], Any] = {}
    for name, count in TRIED:
        if name == "quantile" and found.features_NF is None:
            continue
        calibration, rest = _scored(name, count, found)
        rate = rates[name, count] = tpr_at_fpr(*rest, fpr=0.01, calibration=calibration)
        area = auc_interval(*rest, experiment_rng(1, "bootstrap", name), resamples=100)
        print(
            f"{name:14} {count:2} references  AUC {area.value:.3f} [{area.low:.3f}, {area.high:.3f}]  TPR at 1% FPR "
            f"{rate.tpr.value:.3f} [{rate.tpr.low:.3f}, {rate.tpr.high:.3f}] (FPR there {rate.fpr.value:.4f})",
            flush=True,
        )
    print(f"{case}: LiRA with 16 beats loss: {_above(rates['lira', 16], rates['loss', 16])}")
    print(f"{case}: RMIA with 2 at least LiRA with 4: {_above(rates['rmia', 2], rates['lira', 4])}")


def _above(one: Any, other: Any) -> str:
    """Return whether one rate is above another, and whether their intervals are apart."""
    word = "yes" if one.tpr.value >= other.tpr.value else "NO"
    apart = one.tpr.low > other.tpr.high or one.tpr.high < other.tpr.low
    return f"{word} ({one.tpr.value:.3f} against {other.tpr.value:.3f}{'' if apart else ', intervals overlap'})"


def _scored(name: str, count: int, found: Overfitted) -> list[tuple[Any, Any]]:
    """Return (scores, bits) of the even and of the odd models in turn as the attacked one."""
    from privfed_attacks.membership import MEMBERSHIP, Evidence

    losses_KN, members_KQ, labels, inputs = found.losses_KN, found.members_KQ, found.labels_N, found.features_NF
    models, queries = members_KQ.shape
    parts: list[list[tuple[Any, Any]]] = [[], []]
    for target in range(models):
        others = np.delete(np.arange(models), target)
        chosen = experiment_rng(1, "references", target, count).permutation(others)[:count]
        inside = members_KQ[chosen].sum(axis=0)
        usable = (inside > 0) & (inside < count)
        evidence = Evidence(
            losses_Q=losses_KN[target, :queries][usable],
            labels_Q=labels[:queries][usable],
            features_QF=None if inputs is None else inputs[:queries][usable],
            population_losses_Z=losses_KN[target, queries:],
            population_labels_Z=labels[queries:],
            population_features_ZF=None if inputs is None else inputs[queries:],
            reference_losses_KQ=losses_KN[chosen, :queries][:, usable],
            reference_members_KQ=members_KQ[chosen][:, usable],
            reference_population_losses_KZ=losses_KN[chosen, queries:],
        )
        if name == "quantile" and target >= 12:  # two regressions on 384 features a model
            continue
        parts[target % 2].append((MEMBERSHIP.get(name).score(evidence), members_KQ[target, usable]))
    return [tuple(np.concatenate(column) for column in zip(*part, strict=True)) for part in parts]  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["theory", "shadows"], help="theory, shadows, head, lora")
    parser.add_argument("--trials", type=int, default=4000, help="steps of theory")
    parser.add_argument("--models", type=int, default=64)
    parser.add_argument("--examples", type=int, help="queries of shadows")
    parser.add_argument("--steps", type=int, help="of each shadow")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if "theory" in options.parts:
        theory(options.trials)
    if "shadows" in options.parts:
        for case in [name for name in SETTINGS if name in options.parts] or list(SETTINGS):
            shadows(case, options.models, options.examples, options.steps)


if __name__ == "__main__":
    main()
