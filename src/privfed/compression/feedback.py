"""Error feedback: what a client's message left out is kept by the client and added to its next update.

The residual is a function of the client's data that no noise protects: it is the client's own state, is saved with it,
and never leaves it. Under client-level privacy the *corrected* update is what has to be clipped.

Sources: Stich et al. 2018 (arXiv 1809.07599, algorithm 1); Karimireddy et al. 2019 (arXiv 1901.09847).
"""

from __future__ import annotations

import numpy as np

from privfed.compression import Codec
from privfed.compression.message import sum_of_one
from privfed.errors import ClientError
from privfed.types import Encoded, Float32

RESIDUAL = "residual"
"""The key of a client's residual among the arrays that it keeps."""


def corrected(update_D: Float32, residual_D: Float32 | None) -> Float32:
    """Return the update with the last residual added: what has to be clipped, and then encoded.

    Raises:
        ClientError: If the residual is of another length.
    """
    if residual_D is None:
        return update_D
    if residual_D.shape != update_D.shape:
        raise ClientError(
            f"The client's residual has {residual_D.size} values and its update {update_D.size}: it is from another "
            "set of trained tensors; delete the client's state."
        )
    return update_D + residual_D


def residual(codec: Codec, corrected_D: Float32, encoded: Encoded) -> Float32:
    """Return the corrected update minus what ``encoded`` stands for; the two add up to it, to float32's rounding.

    Args:
        codec: The codec of the round; after two passes, that of the second one.
        corrected_D: What was encoded, after clipping.
        encoded: The (last) message.
    """
    sent_D = codec.decode_sum(sum_of_one(encoded, codec))
    return (corrected_D.astype(np.float64) - sent_D).astype(np.float32)
