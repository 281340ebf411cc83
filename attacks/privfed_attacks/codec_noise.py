"""What a codec leaves of an update and what it adds, tensor by tensor: what makes an attack adapt to compression.

Which codec clients use is public, so the adversary runs it: on random values as large as those it saw, once. What comes
back is taken as a multiple of what went in plus noise, and the noise is what an attack has to allow for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from privfed.compression import CODECS
from privfed.compression.message import sum_of_one
from privfed.compression.state import round_context
from privfed.rng import PrivateStream
from privfed_attacks.observation import Observation, split

_KEPT: dict[str, dict[str, float]] = {}
_MOST = 256


def codec_noise(observation: Observation) -> Mapping[str, float]:
    """Return the standard deviation of what the codec adds to each value, by tensor; empty where that is not known.

    Without a codec nothing is added. Codecs that keep a state on the server or take two exchanges (powersgd,
    count_sketch, global_mask) cannot be run on one update alone: for those, nothing is said.
    """
    table = observation.side.compression
    if table is None or getattr(table, "name", "identity") == "identity":
        return {}
    seen_D = observation.flat()
    key = hashlib.sha256(f"{table!r} {observation.contributors}".encode() + seen_D.tobytes()).hexdigest()
    if key not in _KEPT:
        while len(_KEPT) >= _MOST:
            _KEPT.pop(next(iter(_KEPT)))
        _KEPT[key] = _simulated(observation)
    return _KEPT[key]


def _simulated(observation: Observation) -> dict[str, float]:
    table = observation.side.compression
    plugin = CODECS.get(str(getattr(table, "name", "")))
    codec = plugin.build(table, None)
    if codec.properties.server_state or codec.properties.second_pass:
        return {}
    if codec.properties.needs_context:
        codec = codec.at(round_context(b"attack", 1, shapes=observation.layout.shapes))
    # the average of n clients is as much smaller than one client's update as independent ones make it
    sizes = {n: float(np.sqrt(np.mean(v.astype(np.float64) ** 2))) for n, v in observation.payload.items()}
    draw = np.random.default_rng(0)
    largest = np.sqrt(observation.contributors)
    parts = [sizes[n] * largest * draw.laplace(0, 2**-0.5, v.size) for n, v in observation.payload.items()]
    sent_D = np.concatenate(parts).astype(np.float32)
    encoded = codec.encode(sent_D, PrivateStream(bytes(32), "codec noise"))
    came_D = codec.decode_sum(sum_of_one(encoded, codec))
    sent, came = (split(np.asarray(values, dtype=np.float32), observation.layout) for values in (sent_D, came_D))
    return {name: _noise(sent[name], came[name]) / float(largest) for name in sent}


def _noise(sent: np.ndarray, came: np.ndarray) -> float:
    """Return the root mean square of what came that is no multiple of what was sent."""
    a, b = sent.astype(np.float64).ravel(), came.astype(np.float64).ravel()
    share = float(a @ b) / max(float(a @ a), 1e-300)
    return float(np.sqrt(np.mean((b - share * a) ** 2)))
