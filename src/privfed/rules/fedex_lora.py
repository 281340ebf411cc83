"""FedEx-LoRA: averages A and B, and adds what that misses to the frozen weight.

Singhal et al. 2025, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models",
arXiv 2410.09432: the residual mean(BA) - mean(B) mean(A), times the scale, makes the global model the exact average of
the clients' models. The products of single clients are needed, which a sum of factors does not hold.
"""

from __future__ import annotations

from collections.abc import Sequence

from privfed.rules import LORA_TUNINGS, RULES, Contribution, Rule, Setting, Tensors


@RULES.register("fedex_lora")
class FedExLora(Rule):
    """Carries the base weights."""

    needs_individual = True
    takes = LORA_TUNINGS
    ranks = True
    plain_server = True
    changes_base = True

    def step(
        self, before: Tensors, averaged: Tensors, contributions: Sequence[Contribution], setting: Setting
    ) -> Tensors:
        """Return the weights with the residual; the factors are the averages."""
        from privfed.rules.factors import product, stacked, with_added

        after = {}
        for pair in setting.pairs:
            b_MS, a_SN = stacked(contributions, pair)
            after[pair.weight] = with_added(before, pair, b_MS @ a_SN - product(averaged, pair))
        return after
