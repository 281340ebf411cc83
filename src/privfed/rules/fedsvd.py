"""FedSVD: clients train B; the server gives BA a new, orthonormal A after each round.

Lee et al. 2025, "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", arXiv 2505.12805.
With A fixed during a round the average of B is exact and noise has no product term, as with FFA-LoRA; and A follows
what was learned: BA = U S V^T gives A = V^T and B = U S, the same product. The decomposition is of the released
average, so it costs no privacy.
"""

from __future__ import annotations

from collections.abc import Sequence

from privfed.rules import LORA_TUNINGS, RULES, Contribution, Pair, Rule, Setting, Tensors


@RULES.register("fedsvd")
class FedSvd(Rule):
    """Carries A; clients train B."""

    takes = LORA_TUNINGS | {"ffa_lora"}
    ranks = True
    plain_server = True

    def carried(self, pairs: Sequence[Pair]) -> tuple[str, ...]:
        """Return A's names."""
        return tuple(pair.a for pair in pairs)

    def step(
        self,
        before: Tensors,  # noqa: ARG002
        averaged: Tensors,
        contributions: Sequence[Contribution],  # noqa: ARG002
        setting: Setting,
    ) -> Tensors:
        """Return A with orthonormal rows and the B that keeps the product."""
        from privfed.rules.factors import a_of, b_of, best_factors, shaped

        after = {}
        for pair in setting.pairs:
            a_RN = a_of(averaged, pair)
            u_MR, values_R, vt_RN = best_factors(b_of(averaged, pair), a_RN, len(a_RN))
            after[pair.a] = shaped(vt_RN, averaged[pair.a])
            after[pair.b] = shaped(u_MR * values_R, averaged[pair.b])
        return after
