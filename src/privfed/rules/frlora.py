"""FRLoRA: what a round learned goes into the base weight, and the factors start anew.

Yan et al. 2025, "Federated Residual Low-Rank Adaptation of Large Language Models", ICLR. The factors start each round
as the principal singular vectors of the *pre-trained* weight (B0, A0); the base weight is W - s B0 A0, so that the
model is unchanged. After the round the base weight takes the residual s (mean(B) mean(A) - B0 A0): over rounds the
update outgrows the rank of one adapter. It needs averages only, so sums may be masked and noised; the residual is
post-processing of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from privfed.rules import LORA_TUNINGS, RULES, Contribution, Pair, Rule, Setting, Tensors
from privfed.types import Float32


@RULES.register("frlora")
class FrLora(Rule):
    """Carries the base weights; factors are the same at the start of every round."""

    takes = LORA_TUNINGS
    plain_server = True
    changes_base = True

    def remade(self, pairs: Sequence[Pair]) -> frozenset[str]:
        """Return the names of all factors."""
        return frozenset(name for pair in pairs for name in (pair.a, pair.b))

    def start(self, tensors: Tensors, setting: Setting) -> Tensors:
        """Return the principal factors of the weights, taken out of the weights."""
        import numpy as np

        from privfed.rules.factors import a_of, best_factors, product, shaped, weight_of, with_added

        found: dict[str, Float32] = {}
        for pair in setting.pairs:
            weight_MN = weight_of(tensors, pair)
            rank = len(a_of(tensors, pair))
            u_MR, values_R, vt_RN = best_factors(weight_MN, np.eye(weight_MN.shape[1]), rank)
            root_R = np.sqrt(values_R / pair.scale)
            factors = {
                pair.a: shaped(root_R[:, None] * vt_RN, tensors[pair.a]),
                pair.b: shaped(u_MR * root_R, tensors[pair.b]),
            }
            # what was there (a warm start's B A, usually 0) stays in the weight
            change_MN = product(tensors, pair) - product(factors, pair)
            found |= factors | {pair.weight: with_added(tensors, pair, change_MN)}
        return found

    def step(
        self,
        before: Tensors,
        averaged: Tensors,
        contributions: Sequence[Contribution],  # noqa: ARG002
        setting: Setting,
    ) -> Tensors:
        """Return the weights with the residual, and the factors of the start."""
        from privfed.rules.factors import product, with_added

        after = {}
        for pair in setting.pairs:
            residual_MN = product(averaged, pair) - product(before, pair)
            after[pair.weight] = with_added(before, pair, residual_MN)
            after[pair.a], after[pair.b] = before[pair.a], before[pair.b]
        return after
