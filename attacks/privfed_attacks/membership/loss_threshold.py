"""The loss threshold: members are fitted, so their loss is lower.

Yeom, Giacomelli, Fredrikson and Jha 2018, "Privacy Risk in Machine Learning: Analyzing the Connection to Overfitting",
arXiv 1709.01604, Adversary 1.
"""

from __future__ import annotations

from privfed_attacks.membership import Floats, attack


@attack("loss")
def loss(losses_Q: Floats) -> Floats:
    """Return minus the loss.

    The adversary can run the released model on the query and knows its label; nothing else.
    """
    return -losses_Q
