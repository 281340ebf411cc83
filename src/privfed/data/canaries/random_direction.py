"""Records whose gradient is a random direction over all trained values, beyond the clip.

Andrew et al. 2024, "One-shot Empirical Privacy Estimation for Federated Learning", arXiv 2302.03098, algorithm 1: under
client-level privacy such a record is all that a canary client has, so the client's update is the direction. Random
directions are nearly orthogonal to one another and to what honest clients send, whatever is trained.
"""

from __future__ import annotations

from privfed.data.canaries import CANARIES, changed
from privfed.data.canaries.gradient import GIVEN

CANARIES.register("random_direction")(changed(GIVEN, gradient="random"))
