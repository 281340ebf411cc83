"""SCAFFOLD: control variates correct each client's drift.

Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML, arXiv 1910.06378,
Algorithm 1 with option II. A client steps along g - c_i + c, where c_i is its own control variate and c the server's.
After K steps of learning rate h its variate is c_i+ = c_i - c + (x - y) / (K h), and the algorithm's second message is

    c_i+ - c_i = -c - (y - x) / (K h),

a function of the broadcast (c) and of the first message (y - x). All clients take the same K steps of the same h, so
the server computes the sum of the second messages from the sum of the first, exactly. Nothing more is sent. So:

* Bytes: up as FedAvg; down twice as many, for c is broadcast.
* Example level: the correction is added after clipping and noise, and every c_i is a function of broadcasts and of the
  client's own released updates. All of it is post-processing: the events are FedAvg's, with nothing more to charge.
* Client level: the clipped update is all that a client contributes, its sensitivity is the clip, and c is computed
  from noised sums. The client derives its c_i+ from the clipped update as well, so c stays the average of the c_i but
  for the noise. Clipping and noising both messages as one vector would cost accuracy for nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privfed.rules import RULES, Rule
from privfed.types import Float32

CONTROL = "scaffold.control"


@RULES.register("scaffold")
class Scaffold(Rule):
    """Averages like FedAvg; clients and server keep control variates."""

    variates = True


def variate_change(control_M: Float32, delta_M: NDArray[np.floating], rates_M: Float32) -> NDArray[np.float64]:
    """Return c_i+ - c_i, the second message; of a mean of updates, the mean of the second messages.

    Args:
        control_M: The server's control variate c.
        delta_M: The first message y - x, or the mean of them.
        rates_M: K h, each value's learning rate times the local steps.
    """
    return -control_M.astype(np.float64) - delta_M.astype(np.float64) / rates_M
