"""Records whose gradient is optimised to be like no ordinary record's, at the model that training starts from.

The objective is CANIFE's (Maddock, Sablayrolles and Stock 2023, "CANIFE: Crafting Canaries for Empirical Privacy
Measurement in Federated Learning", arXiv 2210.02912, section 3): a norm of at least the clip, and no product with the
updates of mock clients. CANIFE descends to it through a record's input, as its adversary can only send records; this
one owns the gradient, and there the objective has a closed form: a random direction less its part in the span of mock
gradients. The mock records are test records, which the adversary is taken to have. Later models have other gradients.
"""

from __future__ import annotations

from privfed.data.canaries import CANARIES, changed
from privfed.data.canaries.gradient import GIVEN

CANARIES.register("optimised_direction")(changed(GIVEN, gradient="optimised"))
