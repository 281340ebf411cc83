"""Codecs at d values: encode and decode in GB/s of float32 input, their ratio to a memcpy, and bytes on the wire.

    python benchmarks/compression.py              # d = 1e6, a table
    python benchmarks/compression.py --json

Times are processor times of this process (the best of several), so that other work on the machine does not count. The
memcpy is ``numpy.copyto`` of as many values between two buffers that exist already, in the same run, timed again before
each codec; d = 1e6 is 4 MB, which a large cache holds, and a second memcpy over 256 MB says what the memory gives. In
brackets are the ratios to both, and both are held against the target.
*Encode* is from the vector to the message's values, *pack* from there to bytes; *unpack* is from bytes to the values
that the server adds (checks included), and *decode* from their sum to the vector. Bytes are ``len`` of the message.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from privfed.compression import CODECS, RoundContext
from privfed.compression.message import read, sum_of_one, to_bytes
from privfed.rng import PrivateStream

TARGET = 0.25
TARGETED = ("quantizer", "random_k")
CASES: dict[str, dict[str, Any]] = {
    "identity": {"name": "identity"},
    "cast bfloat16": {"name": "cast"},
    "cast float16": {"name": "cast", "dtype": "float16"},
    **{
        f"stochastic_quantizer {bits} bit": {"name": "stochastic_quantizer", "bits": bits, "max_value": 0.2}
        for bits in (1, 2, 4, 8, 16)
    },
    "sign": {"name": "sign"},
    "rotated_quantizer 4 bit": {"name": "rotated_quantizer", "bits": 4, "max_norm": 50.0},
    "random_k 10%": {"name": "random_k", "density": 0.1},
    "random_k 1%": {"name": "random_k", "density": 0.01},
    "random_k 10% + 4 bit": {
        "name": "random_k",
        "density": 0.1,
        "inner": {"name": "stochastic_quantizer", "bits": 4, "max_value": 0.2},
    },
    "top_k 1%": {"name": "top_k", "density": 0.01},
    "top_k 1% + 4 bit": {
        "name": "top_k",
        "density": 0.01,
        "inner": {"name": "stochastic_quantizer", "bits": 4, "max_value": 0.4},
    },
    "count_sketch 5 x 10000": {"name": "count_sketch"},
    "powersgd rank 4": {"name": "powersgd"},
    "svd_truncate rank 4": {"name": "svd_truncate"},
    "global_mask 10%": {"name": "global_mask", "density": 0.1},
    "seed_projection 1024": {"name": "seed_projection"},
}


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the least processor time of one call."""
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return max(best, 1e-9)


def memcpy_rate(values: int, repeats: int) -> float:
    """Return GB/s of copying that many float32 values between two existing buffers."""
    source, target = np.ones(values, dtype=np.float32), np.zeros(values, dtype=np.float32)
    return 4e-9 * values / seconds(lambda: np.copyto(target, source), repeats)


def measure(options: dict[str, Any], vector_D: np.ndarray, repeats: int) -> dict[str, Any]:
    """Return the times of one codec and the bytes of its messages."""
    length, plugin = len(vector_D), CODECS.get(options["name"])
    base, rows = plugin.build(plugin.config(**options), None), int(length**0.5)
    context = RoundContext(run_seed=bytes(32), round_seed=bytes(32), shapes=((rows, rows), (length - rows * rows,)))
    state = base.start_state(length)
    if options["name"] == "global_mask":  # a round with a mask, not the first one
        _, state = base.at(context).expand(vector_D.astype(np.float64), state, length)
        context = RoundContext(
            run_seed=bytes(32), round_seed=bytes(32), shapes=context.shapes, carried=base.public_state(state)
        )
    codec, stream = base.at(context), PrivateStream(bytes(32), "benchmark")
    found = dict.fromkeys(("encode", "pack", "unpack", "decode"), 0.0) | {"bytes": 0}
    while True:
        encoded = codec.encode(vector_D, stream)  # draws what the whole round shares, which is not timed
        message = to_bytes(encoded, client_id="client-00", weight=1.0)
        total = sum_of_one(encoded, codec)
        linear_M = codec.linear_sum(total)
        found["bytes"] += len(message)
        found["encode"] += seconds(lambda: codec.encode(vector_D, stream), repeats)  # noqa: B023
        found["pack"] += seconds(lambda: to_bytes(encoded, client_id="client-00", weight=1.0), repeats)  # noqa: B023
        found["unpack"] += seconds(lambda: read(message, length=length, codec=codec), repeats)  # noqa: B023
        if codec.properties.second_pass:
            message_M = codec.between(linear_M, length)  # type: ignore[attr-defined]
            found["decode"] += seconds(lambda: codec.between(codec.linear_sum(total), length), repeats)  # type: ignore[attr-defined]  # noqa: B023
            codec = codec.second(message_M, length)  # type: ignore[attr-defined]
            continue
        found["decode"] += seconds(lambda: codec.expand(codec.linear_sum(total), state, length), repeats)  # noqa: B023
        return found


def main() -> None:
    """Measure every codec and print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--values", type=int, default=1_000_000, help="d")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", help="only cases whose name holds this")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    vector_D = (np.random.default_rng(0).standard_normal(options.values) / 25).astype(np.float32)
    rows = []
    for case, table in CASES.items():
        if options.only and options.only not in case:
            continue
        copy = memcpy_rate(options.values, 4 * options.repeats)
        slow = table["name"] in ("svd_truncate", "count_sketch")
        found = measure(table, vector_D, 3 if slow else options.repeats)
        rates = {name: 4e-9 * options.values / found[name] for name in ("encode", "pack", "unpack", "decode")}
        rows.append({"codec": case, "memcpy": copy, "bytes": found["bytes"], **rates})
    memory = memcpy_rate(1 << 26, 5)
    if options.json:
        print(json.dumps({"values": options.values, "memcpy_256MB": memory, "codecs": rows}))
        return
    print(
        f"d = {options.values}; memcpy of 256 MB: {memory:.1f} GB/s. "
        "GB/s of float32 input (ratio to memcpy of d values, to memcpy of 256 MB)"
    )
    print(f"{'codec':28}{'memcpy':>8}{'encode':>22}{'pack':>8}{'unpack':>8}{'decode':>22}{'bytes':>11}{'of fp32':>9}")
    for row in rows:
        text = f"{row['codec']:28}{row['memcpy']:8.1f}{_rate(row, 'encode', memory)}"
        text += f"{row['pack']:8.2f}{row['unpack']:8.2f}{_rate(row, 'decode', memory)}"
        text += f"{row['bytes']:11}{row['bytes'] / (4 * options.values):9.2%}"
        if any(name in row["codec"] for name in TARGETED):
            met = ["met" if row["encode"] >= TARGET * copy else "missed" for copy in (row["memcpy"], memory)]
            text += f"   target {TARGET}: {met[0]}, {met[1]}"
        print(text)


def _rate(row: dict[str, Any], what: str, memory: float) -> str:
    """Return a rate and its two ratios."""
    return f"{row[what]:8.2f} ({row[what] / row['memcpy']:5.3f}, {row[what] / memory:4.2f})"


if __name__ == "__main__":
    main()
