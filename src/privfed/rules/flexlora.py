"""FlexLoRA: averages the products, and cuts the average back to the adapter's rank.

Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
NeurIPS, arXiv 2402.11505: mean(B_i A_i) = U S V^T, cut to rank r, gives B = U S and A = V^T. Exact up to the cut; the
products of single clients are needed. The factors come in the order of their singular values, so with
``server.ranks`` a client that takes the first r of them has the best approximation of its rank: the paper's
redistribution.
"""

from __future__ import annotations

from collections.abc import Sequence

from privfed.rules import LORA_TUNINGS, RULES, Contribution, Rule, Setting, Tensors


@RULES.register("flexlora")
class FlexLora(Rule):
    """Makes both factors anew from the averaged product."""

    needs_individual = True
    takes = LORA_TUNINGS
    ranks = True
    plain_server = True

    def step(
        self,
        before: Tensors,
        averaged: Tensors,  # noqa: ARG002
        contributions: Sequence[Contribution],
        setting: Setting,
    ) -> Tensors:
        """Return the factors of the cut average."""
        from privfed.rules.factors import best_factors, shaped, stacked

        after = {}
        for pair in setting.pairs:
            u_MR, values_R, vt_RN = best_factors(*stacked(contributions, pair), len(before[pair.a]))
            after[pair.a] = shaped(vt_RN, before[pair.a])
            after[pair.b] = shaped(u_MR * values_R, before[pair.b])
        return after
