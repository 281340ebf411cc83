"""FLoRA: stacks the clients' factors, merges the stack into the base weight, and starts with fresh ones.

Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations", NeurIPS,
arXiv 2409.05976: [p_1 B_1, ..., p_K B_K] [A_1; ...; A_K] is the exact average of the products. Each round's A is drawn
from the run's seed as peft draws it (uniform up to 1 / sqrt(inputs)), and B starts at 0. The merged weight itself is
broadcast rather than the stack, so a client need not have taken part before.
"""

from __future__ import annotations

from collections.abc import Sequence

from privfed.rng import experiment_rng
from privfed.rules import LORA_TUNINGS, RULES, Contribution, Pair, Rule, Setting, Tensors


@RULES.register("flora")
class FLora(Rule):
    """Carries the base weights; factors are fresh in every round."""

    needs_individual = True
    takes = LORA_TUNINGS
    ranks = True
    plain_server = True
    changes_base = True

    def remade(self, pairs: Sequence[Pair]) -> frozenset[str]:
        """Return the names of all factors."""
        return frozenset(name for pair in pairs for name in (pair.a, pair.b))

    def step(
        self,
        before: Tensors,
        averaged: Tensors,  # noqa: ARG002
        contributions: Sequence[Contribution],
        setting: Setting,
    ) -> Tensors:
        """Return the merged weights and fresh factors."""
        import numpy as np

        from privfed.rules.factors import shaped, stacked, with_added

        after = {}
        for pair in setting.pairs:
            b_MS, a_SN = stacked(contributions, pair)
            after[pair.weight] = with_added(before, pair, b_MS @ a_SN)
            rng = experiment_rng(setting.seed, "flora", setting.round, pair.a)
            fresh = rng.uniform(-1, 1, before[pair.a].shape) / np.sqrt(a_SN.shape[1])
            after[pair.a] = shaped(fresh, before[pair.a])
            after[pair.b] = np.zeros_like(before[pair.b])
        return after
