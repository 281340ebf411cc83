"""Secure aggregation against Flower's SecAgg+, both sides in one run on one machine.

    python -m venv flower && flower/bin/pip install "flwr==1.41.*" msgpack matplotlib
    PYTHONPATH=src flower/bin/python benchmarks/secagg.py --plot secagg.png

Seconds depend on the machine, ratios hardly. Both sides use the same graph and threshold. What is timed:

- *client*: all that one client computes in a round. Flower's share of it is its own stage functions, less its
  quantisation, and without its messages; ours is the whole session with encoding, signatures and checks.
- *server*: adding the masked vectors, recovering secrets, removing masks. On our side signatures and checks as well.
- *upload*: bytes that one client sends; of Flower only keys, shares and vector, without any framing.

The best of ``--repeat`` rounds counts, on both sides. Where n * d is above ten million, only two of Flower's clients
mask for real and the others' vectors are random numbers: its server does the same work on them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from privfed.secagg import ClientSession, Identity, Requirements, ServerSession, SessionParams
from privfed.secagg.keystream import BLOCK_BYTES, apply_masks

RING_BITS = 24
REAL_UP_TO = 10_000_000
HOW = 'Flower is not here: pip install "flwr==1.41.*" into an environment, and run this file with its Python.'


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one round cost; seconds and bytes."""

    client: float
    server: float
    upload: int


class Clock:
    """Adds up seconds by name: of the wall, or of the processors (all threads together)."""

    now: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, name: str, act: Callable[..., Any], *arguments: Any) -> Any:
        """Return what ``act`` returns and add its time to ``name``."""
        started = Clock.now()
        result = act(*arguments)
        self.seconds[name] = self.seconds.get(name, 0.0) + Clock.now() - started
        return result


def plan(length: int, people: dict[str, Identity], attempt: int = 0) -> SessionParams:
    """Return the session of these clients with the default requirements."""
    roster = {name: person.public for name, person in people.items()}
    return SessionParams.plan(
        roster,
        Requirements(),
        round_id=f"round {attempt}".encode(),
        config_digest=bytes(32),
        length=length,
        ring_bits=RING_BITS,
    )


def ours(params: SessionParams, people: dict[str, Identity], dropped: int) -> Cost:
    """Return the cost of one round of privfed, whose sum is checked."""
    clock, names = Clock(), list(params.clients)
    server = clock.run("server", ServerSession, params)
    clients = {name: clock.run(name, ClientSession, params, name, people[name]) for name in names}
    sent = dict.fromkeys(names, 0)

    def up(name: str, receive: Callable[[bytes], Any], answer: Callable[..., bytes], *given: Any) -> None:
        message = clock.run(name, answer, *given)
        sent[name] += len(message)
        clock.run("server", receive, message)

    for name in names:
        up(name, server.receive_advertise, clients[name].advertise)
    for name in names:
        up(name, server.receive_share, clients[name].share, clock.run("server", server.roster_for, name))
    alive, rng = names[dropped:], np.random.default_rng(1)
    expected = np.zeros(params.length, dtype=np.uint32)
    for name in alive:
        values = rng.integers(0, 2**RING_BITS, params.length, dtype=np.uint32)
        expected += values
        shares = clock.run("server", server.shares_for, name)
        up(name, server.receive_masked, clients[name].masked_input, shares, values)
    for name in alive:
        up(name, server.receive_agree, clients[name].agree, clock.run("server", server.survivors_for, name))
    for name in alive:
        up(name, server.receive_unmask, clients[name].unmask, clock.run("server", server.agreement_for, name))
    total, _ = clock.run("server", server.sum)
    assert np.array_equal(total, expected & np.uint32(2**RING_BITS - 1))
    return Cost(
        client=float(np.median([clock.seconds[name] for name in alive])),
        server=clock.seconds["server"],
        upload=sent[alive[0]],
    )


class Flower:
    """One round of Flower's SecAgg+, by its own functions."""

    def __init__(self, n: int, length: int, shares: int, threshold: int) -> None:
        from flwr.common import bytes_to_ndarray, ndarray_to_bytes, ndarrays_to_parameters
        from flwr.common.secure_aggregation import ndarrays_arithmetic, secaggplus_utils
        from flwr.common.secure_aggregation.crypto import shamir, symmetric_encryption
        from flwr.common.secure_aggregation.secaggplus_constants import Key
        from flwr.supercore.primitives import asymmetric

        self.mod: Any = import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
        self.key, self.arithmetic, self.utils = Key, ndarrays_arithmetic, secaggplus_utils
        self.shamir, self.symmetric, self.asymmetric = shamir, symmetric_encryption, asymmetric
        self.to_bytes, self.from_bytes, self.to_parameters = ndarray_to_bytes, bytes_to_ndarray, ndarrays_to_parameters
        self.n, self.length, self.shares, self.threshold = n, length, shares, threshold
        self.clock = Clock()
        ids = list(range(1, n + 1))
        random.Random(7).shuffle(ids)
        half = shares >> 1
        self.near = {ids[i]: {ids[(i + o) % n] for o in range(-half, half + 1)} for i in range(n)}

    def round(self, dropped: int) -> Cost:
        """Return the cost of one round."""
        states, public, inbox, sent = self._keys_and_shares()
        alive = sorted(states)[dropped:]
        real = alive if self.n * self.length <= REAL_UP_TO else alive[:2]
        total: Any = None
        for one in alive:
            if one in real:
                raw = self._mask(one, states[one], inbox[one])
                sent[one] += sum(map(len, raw))
            else:
                self._receive(states[one], inbox[one])
                raw = self._random_vector()
            total = self.clock.run("server", self._add, total, raw)
        answers = {}
        for one in alive:
            configs = {
                self.key.ACTIVE_NODE_ID_LIST: sorted(self.near[one] & set(alive)),
                self.key.DEAD_NODE_ID_LIST: sorted(self.near[one] - set(alive)),
            }
            answers[one] = self.clock.run(f"{one}", self.mod._unmask, states[one], configs)
            sent[one] += sum(map(len, answers[one][self.key.SHARE_LIST]))
        self.clock.run("server", self._unmask, total, answers, set(alive), public)
        times = self.clock.seconds
        spent = float(np.median([times[str(one)] - times.get(f"quantise {one}", 0.0) for one in real]))
        return Cost(client=spent, server=times["server"], upload=sent[real[0]])

    def _keys_and_shares(self) -> tuple[dict[int, Any], dict[int, Any], dict[int, Any], dict[int, int]]:
        key, states, public, sent = self.key, {}, {}, {}
        setup = {
            key.SAMPLE_NUMBER: self.n,
            key.SHARE_NUMBER: self.shares,
            key.THRESHOLD: self.threshold,
            key.CLIPPING_RANGE: 8.0,
            key.TARGET_RANGE: 1 << 22,
            key.MOD_RANGE: 1 << 32,
            key.MAX_WEIGHT: 1000.0,
        }
        for one in self.near:
            states[one] = self.mod.SecAggPlusState()
            states[one].nid = one
            got = self.clock.run(f"{one}", self.mod._setup, states[one], setup)
            public[one] = (got[key.PUBLIC_KEY_1], got[key.PUBLIC_KEY_2])
            sent[one] = sum(map(len, public[one]))
        inbox: dict[int, Any] = {one: {key.CIPHERTEXT_LIST: [], key.SOURCE_LIST: []} for one in self.near}
        for one, near in self.near.items():
            cards = {str(peer): public[peer] for peer in near}
            got = self.clock.run(f"{one}", self.mod._share_keys, states[one], cards)
            sent[one] += sum(map(len, got[key.CIPHERTEXT_LIST]))
            for peer, text in zip(got[key.DESTINATION_LIST], got[key.CIPHERTEXT_LIST], strict=True):
                inbox[peer][key.CIPHERTEXT_LIST].append(text)
                inbox[peer][key.SOURCE_LIST].append(one)
        return states, public, inbox, sent

    def _mask(self, one: int, state: Any, inbox: Any) -> list[bytes]:
        quantize = self.mod.quantize
        parameters = self.to_parameters([np.random.default_rng(one).standard_normal(self.length)])
        self.mod.quantize = lambda *arguments: self.clock.run(f"quantise {one}", quantize, *arguments)
        try:
            got = self.clock.run(f"{one}", self.mod._collect_masked_vectors, state, inbox, 500, parameters)
        finally:
            self.mod.quantize = quantize
        return list(got[self.key.MASKED_PARAMETERS])

    def _receive(self, state: Any, inbox: Any) -> None:
        """Open the shares as its masking does, for a client that does not mask."""
        for peer, text in zip(inbox[self.key.SOURCE_LIST], inbox[self.key.CIPHERTEXT_LIST], strict=True):
            plain = self.mod.share_keys_plaintext_separate(self.mod.decrypt(state.ss2_dict[peer], text))
            _, _, state.rd_seed_share_dict[peer], state.sk1_share_dict[peer] = plain

    def _random_vector(self) -> list[bytes]:
        rng = np.random.default_rng(3)
        return [self.to_bytes(rng.integers(0, 2**32, size, dtype=np.int64)) for size in (1, self.length)]

    def _add(self, total: Any, raw: list[bytes]) -> Any:
        vector = [self.from_bytes(one) for one in raw]
        return vector if total is None else self.arithmetic.parameters_addition(total, vector)

    def _unmask(self, total: Any, answers: dict[int, Any], alive: set[int], public: dict[int, Any]) -> None:
        """What its workflow does in its last stage, up to the sum."""
        shapes = self.arithmetic.get_parameters_shape(total)
        total, collected = self.arithmetic.parameters_mod(total, 1 << 32), {one: [] for one in self.near}
        for answer in answers.values():
            for owner, share in zip(answer[self.key.NODE_ID_LIST], answer[self.key.SHARE_LIST], strict=True):
                collected[owner].append(share)
        for owner, shares in collected.items():
            secret = self.shamir.combine_shares(shares)
            if owner in alive:
                mask = self.utils.pseudo_rand_gen(secret, 1 << 32, shapes)
                total = self.arithmetic.parameters_subtraction(total, mask)
                continue
            private = self.asymmetric.bytes_to_private_key(secret)
            for peer in self.near[owner] - {owner}:
                other = self.asymmetric.bytes_to_public_key(public[peer][0])
                seed = self.symmetric.generate_shared_key(private, other)
                mask = self.utils.pseudo_rand_gen(seed, 1 << 32, shapes)
                combine = (
                    self.arithmetic.parameters_addition if owner > peer else self.arithmetic.parameters_subtraction
                )
                total = combine(total, mask)
        self.arithmetic.parameters_mod(total, 1 << 32)


def best(costs: Sequence[Cost]) -> Cost:
    """Return the smallest of each figure."""
    return Cost(
        client=min(cost.client for cost in costs),
        server=min(cost.server for cost in costs),
        upload=min(cost.upload for cost in costs),
    )


def keystream_rates(length: int, streams: int, repeat: int) -> tuple[float, float]:
    """Return bytes a second of the bare cipher and of masking, on one thread each, in turn."""
    keys = [bytes([number]) * 32 for number in range(streams)]
    zeros, buffer = bytes(BLOCK_BYTES), bytearray(BLOCK_BYTES + 15)
    values = np.zeros(length, dtype=np.uint32)

    def bare() -> None:
        for key in keys:
            cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
            for _ in range(-(-4 * length // BLOCK_BYTES)):
                cipher.update_into(zeros, buffer)

    fastest = [float("inf"), float("inf")]
    for _ in range(max(5, repeat)):
        for place, act in enumerate((bare, lambda: apply_masks(values, keys, threads=1))):
            started = Clock.now()
            act()
            fastest[place] = min(fastest[place], Clock.now() - started)
    whole = streams * -(-4 * length // BLOCK_BYTES) * BLOCK_BYTES
    return whole / fastest[0], 4 * length * streams / fastest[1]


def measure(n: int, length: int, dropped: float, repeat: int, flower: bool) -> dict[str, Any]:
    """Return one row: both sides and their ratios."""
    people = {f"c{i:04d}": Identity.generate() for i in range(n)}
    params, gone = plan(length, people), int(dropped * n)
    row: dict[str, Any] = {"n": n, "d": length, "dropped": dropped, "k": params.degree, "t": params.threshold}
    mine = best([ours(plan(length, people, attempt), people, gone) for attempt in range(repeat)])
    row["privfed"] = asdict(mine)
    row["fixed_bytes"] = mine.upload - params.payload_bytes
    if flower:
        rounds = 1 if n * length > REAL_UP_TO else repeat
        theirs = best([Flower(n, length, params.degree + 1, params.threshold).round(gone) for _ in range(rounds)])
        row["flower"] = asdict(theirs)
        row["faster_client"], row["faster_server"] = theirs.client / mine.client, theirs.server / mine.server
        row["upload_ratio"] = mine.upload / theirs.upload
    return row


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Draw client and server time with nobody dropped: over n for each d, and over d for each n."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 7), sharey=True)
    complete = [row for row in rows if row["dropped"] == 0]
    for line, (over, each, label) in zip(axes, (("n", "d", "clients"), ("d", "n", "values")), strict=True):
        for axis, side in zip(line, ("client", "server"), strict=True):
            for color, fixed in enumerate(sorted({row[each] for row in complete})):
                for engine, style in (("privfed", "o-"), ("flower", "s--")):
                    mine = [row for row in complete if row[each] == fixed and engine in row]
                    points = sorted((row[over], row[engine][side] * 1e3) for row in mine)
                    if points:
                        name = f"{engine}, {each} = {fixed:,}"
                        axis.loglog(*zip(*points, strict=True), style, color=f"C{color}", label=name)
            axis.set(title=side, xlabel=label)
            axis.grid(visible=True, which="both", alpha=0.3)
        line[0].set_ylabel("ms a round")
        line[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return rows as a table."""
    lines = ["| n | d | dropped | client ms | server ms | upload | faster: client | server |", "|---" * 8 + "|"]
    for row in sorted(rows, key=lambda one: (one["n"], one["d"], one["dropped"])):
        mine, theirs = row["privfed"], row.get("flower")
        cells = [f"{row['n']}", f"{row['d']:,}", f"{row['dropped']:.0%}"]
        if theirs:
            cells += [f"{1e3 * mine[side]:.3g} / {1e3 * theirs[side]:,.0f}" for side in ("client", "server")]
            cells += [f"{row['upload_ratio']:.3f}", f"{row['faster_client']:.1f}x", f"{row['faster_server']:.0f}x"]
        else:
            cells += [f"{1e3 * mine[side]:.3g}" for side in ("client", "server")] + ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def show(row: dict[str, Any]) -> str:
    """Return a row as a line."""
    mine = row["privfed"]
    line = (
        f"n {row['n']:4d}  d {row['d']:.0e}  dropped {row['dropped']:3.0%}  k {row['k']:3d}  "
        f"client {1e3 * mine['client']:7.1f} ms  server {1e3 * mine['server']:8.1f} ms  up {mine['upload']:9d} B"
    )
    if "flower" in row:
        line += (
            f"  | Flower {1e3 * row['flower']['client']:8.1f} / {1e3 * row['flower']['server']:9.1f} ms"
            f"  client {row['faster_client']:5.1f}x  server {row['faster_server']:6.1f}x  up {row['upload_ratio']:.3f}"
        )
    return line


def main() -> None:
    """Measure, print, and draw where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--d", type=float, nargs="+", default=[1e5, 1e6])
    parser.add_argument("--dropped", type=float, nargs="+", default=[0.0, 0.1, 0.3])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--plot", help="write a picture of the scaling in n and d here")
    parser.add_argument("--json", type=Path, help="append each row to this file; tabulate and draw all it holds")
    parser.add_argument("--no-flower", action="store_true", help="measure privfed alone")
    parser.add_argument("--cpu", action="store_true", help="processor time, for a machine that is busy otherwise")
    given = parser.parse_args()
    if given.cpu:
        Clock.now = staticmethod(time.process_time)
    flower = not given.no_flower
    if flower:
        try:
            import flwr  # noqa: F401
        except ImportError:
            print(HOW, file=sys.stderr)
            flower = False
    raw, masking = keystream_rates(1_000_000, 10, given.repeat)
    print(f"keystream {raw / 1e9:.2f} GB/s, masking {masking / 1e9:.2f} GB/s on one thread: {masking / raw:.2f} of it")
    rows = []
    for n in given.n:
        for length in given.d:
            for dropped in given.dropped:
                rows.append(measure(n, int(length), dropped, given.repeat, flower))
                print(show(rows[-1]), flush=True)
                if given.json:
                    with given.json.open("a", encoding="utf-8") as out:
                        out.write(json.dumps(rows[-1]) + "\n")
    for row in rows:
        if row["dropped"] == 0:
            print(f"n {row['n']}, d {row['d']}: {row['fixed_bytes']} B beside the vector, for {row['k']} neighbours")
    if given.json:
        rows = [json.loads(line) for line in given.json.read_text().splitlines()]
        print(f"\n{markdown(rows)}")
    if given.plot:
        plot(rows, given.plot)


if __name__ == "__main__":
    main()
