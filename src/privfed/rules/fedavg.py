"""FedAvg: the average of the clients' updates.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", arXiv 1602.05629.
With ``tuning.name = "lora"`` this is FedIT (Zhang et al. 2024, arXiv 2305.05644), which averages A and B apart: the
result is not the average of BA. With ``ffa_lora``, and any tuning that is linear in what is trained, it is.
"""

from __future__ import annotations

from privfed.rules import RULES, Rule


@RULES.register("fedavg")
class FedAvg(Rule):
    """Averages; nothing else."""

    ranks = True
    layers = True
