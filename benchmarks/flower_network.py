"""A deployment over a bad network: every party in a network namespace of its own, with delay, loss and cut links.

    python benchmarks/flower_network.py [FOLDER] [RUN.TOML|PRESET] [privfed overrides, such as -s server.rounds=8]

Needs root and /dev/net/tun. The hosts are network namespaces; the wire between them is this process, which carries each
IP packet from one host's TUN device to another's, late, or not at all. (``tc netem`` does the same in kernels that have
it; many of containers and virtual machines have not.) Everything above the packets is the real thing: TCP and its
retransmissions, TLS, Flower's processes, privfed's deadlines.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from flower_faults import DEADLINE_SECONDS, OWN, STAGE_SECONDS, same_sums
from flower_lab import SERVER, Lab, Place, settings_of, times

NET = "10.77.0."
DEVICE = "privfed0"
T = TypeVar("T")
_CLONE_NEWNET, _TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x40000000, 0x400454CA, 0x0001, 0x1000


def why_not() -> str | None:
    """Return why this machine cannot have such hosts; None where it can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    for command in ("ip", "unshare", "nsenter"):
        if shutil.which(command) is None:
            return f"the command {command} is not here (packages iproute2 and util-linux)"
    if not os.access("/dev/net/tun", os.W_OK):
        return "/dev/net/tun is not here, or may not be used"
    try:
        Host("probe", 1).close()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"a network namespace cannot be made: {error} (it takes root)"
    return None


class Host:
    """A network namespace with one TUN device, whose other end is ``wire``.

    Args:
        name: Of the party.
        number: Last part of its address.
    """

    def __init__(self, name: str, number: int) -> None:
        self.name, self.address = name, f"{NET}{number}"
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        self._space = f"/proc/{self._holder.pid}/ns/net"
        self.within = ["nsenter", f"--net={self._space}"]
        try:
            self._wait()
            self.wire: int = self.inside(_tun)
            for command in (
                "link set lo up",
                f"address add {self.address}/24 dev {DEVICE}",
                f"link set {DEVICE} up",
            ):
                subprocess.run([*self.within, "ip", *command.split()], check=True, capture_output=True)
        except BaseException:
            self._holder.kill()
            self._holder.wait()
            raise

    def _wait(self) -> None:
        own, deadline = Path("/proc/self/ns/net").readlink(), time.monotonic() + 20
        while Path(self._space).readlink() == own:
            if self._holder.poll() is not None or time.monotonic() > deadline:
                raise OSError("unshare --net did not give one")
            time.sleep(0.02)

    def inside(self, do: Callable[[], T]) -> T:
        """Return what a function returns in a thread that is within the namespace."""
        found: list[T] = []
        failed: list[OSError] = []

        def enter() -> None:
            try:
                with Path(self._space).open("rb") as space:
                    if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), _CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                found.append(do())
            except OSError as error:
                failed.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return found[0]

    def round_trip(self, address: str, port: int) -> float:
        """Return the seconds that a TCP connection to an address takes from here."""

        def connect() -> float:
            started = time.perf_counter()
            with socket.create_connection((address, port), timeout=60):
                return time.perf_counter() - started

        return self.inside(connect)

    def close(self) -> None:
        """Let go of the namespace."""
        os.close(self.wire)
        self._holder.kill()
        self._holder.wait()


def _tun() -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    return device


class Wire(threading.Thread):
    """Carries packets between hosts.

    Attributes:
        delay: Seconds that each packet is late, each way.
        loss: Share of packets that are lost.
        cut: Hosts whose link is down.
        counts: Packets by what became of them.
    """

    def __init__(self, hosts: Sequence[Host]) -> None:
        super().__init__(daemon=True)
        self.delay, self.loss = 0.0, 0.0
        self.cut: frozenset[str] = frozenset()
        self.counts: Counter[str] = Counter()
        self._hosts = {host.wire: host for host in hosts}
        self._to = {socket.inet_aton(host.address): host for host in hosts}
        self._late: list[tuple[float, int, int, bytes]] = []
        self._numbers = itertools.count()
        self._random = random.Random(0)
        self._going = True

    def run(self) -> None:
        """Carry packets until stopped."""
        poll = select.poll()
        for wire in self._hosts:
            poll.register(wire, select.POLLIN)
        while self._going:
            due = max(0.0, self._late[0][0] - time.monotonic()) if self._late else 0.2
            for wire, _ in poll.poll(min(0.2, due) * 1000):
                self._take(wire)
            while self._late and self._late[0][0] <= time.monotonic():
                _, _, wire, packet = heapq.heappop(self._late)
                with suppress(BlockingIOError):  # a full queue drops, as anywhere
                    os.write(wire, packet)

    def _take(self, wire: int) -> None:
        for _ in range(64):
            try:
                packet = os.read(wire, 65536)
            except BlockingIOError:
                return
            target = self._to.get(packet[16:20]) if packet[:1] and packet[0] >> 4 == 4 else None
            if target is None:  # IPv6's own chatter, multicast
                continue
            if {target.name, self._hosts[wire].name} & self.cut:
                self.counts["cut"] += 1
            elif self._random.random() < self.loss:
                self.counts["lost"] += 1
            else:
                self.counts["carried"] += 1
                heapq.heappush(self._late, (time.monotonic() + self.delay, next(self._numbers), target.wire, packet))

    def close(self) -> None:
        """Stop."""
        self._going = False
        self.join()


class Network:
    """Hosts for a server and its sites, and the wire between them."""

    def __init__(self, sites: int) -> None:
        names = [SERVER, *(f"site-{number}" for number in range(sites))]
        self.hosts: dict[str, Host] = {}
        try:
            for number, name in enumerate(names, 1):
                self.hosts[name] = Host(name, number)
        except BaseException:
            for host in self.hosts.values():
                host.close()
            raise
        self.wire = Wire(list(self.hosts.values()))
        self.wire.start()
        self.place = Place(
            address=self.hosts[SERVER].address, within={name: host.within for name, host in self.hosts.items()}
        )

    def cut(self, *names: str) -> None:
        """Cut these hosts' links, and mend all others."""
        self.wire.cut = frozenset(names)

    def close(self) -> None:
        """Take it all down."""
        self.wire.close()
        for host in self.hosts.values():
            host.close()


def _rounds(lab: Lab, count: int) -> str:
    """Wait for some rounds and say what they took and who was in them."""
    done = len(lab.rounds())
    lab.wait(lambda: len(lab.rounds()) >= done + count)
    return _told(lab, done)


def _told(lab: Lab, done: int) -> str:
    found = lab.rounds()[done:]
    seconds = ", ".join(f"{each['seconds']['total']:.1f}" for each in found)
    return f"{', '.join('lost' if each['lost'] else str(each['survivors']) for each in found)} | {seconds}"


def _row(network: Network, what: str, told: str) -> str:
    counts = network.wire.counts
    row = f"| {what} | {told} | {counts['carried']} / {counts['lost']} / {counts['cut']} |"
    counts.clear()
    print(row, flush=True)
    return row


def _bad(lab: Lab, network: Network, delay: float, loss: float) -> str:
    network.wire.delay, network.wire.loss = delay, loss
    tries = [network.hosts["site-0"].round_trip(network.place.address, lab.port) for _ in range(5)]
    what = f"{1000 * delay:g} ms each way, {100 * loss:g}% lost (a connection takes {1000 * sorted(tries)[2]:.0f} ms)"
    return _row(network, what, _rounds(lab, 3))


def _cut(lab: Lab, network: Network, names: Sequence[str], seconds: float) -> str:
    """Cut links in the middle of a round, mend them, and wait until everybody is back."""
    done, before = len(lab.rounds()), lab.asked(lab.names[0], "train")
    lab.wait(lambda: lab.asked(lab.names[0], "train") > before)
    network.cut(*names)
    time.sleep(seconds)
    network.cut()
    there = len(lab.rounds())
    lab.wait(lambda: len(lab.rounds()) > there + 1 and lab.rounds()[-1]["survivors"] == len(lab.names))
    return _row(network, f"link of {', '.join(names)} cut for {seconds:g} s", _told(lab, done))


def main() -> None:
    """Run it and print the table."""
    reason = why_not()
    if reason is not None:
        raise SystemExit(f"Not here: {reason}.")
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/flower-network")
    source = sys.argv[2] if len(sys.argv) > 2 else "tiny"
    network = Network(4)
    try:
        lab = Lab(folder, source, [*OWN, *settings_of(sys.argv[3:])], place=network.place)
        rows = _scenes(lab, network)
    finally:
        network.close()
    print("\n| network | clients in each round | s each | packets carried / lost / cut off |\n|---|---|---|---|")
    print("\n".join(rows))
    print("\n".join(lab.ledgers()))
    print(f"every sum as in one process with the same clients absent (same bits): {same_sums(lab)}")
    print(times(lab.folder / "run"))


def _scenes(lab: Lab, network: Network) -> list[str]:
    try:
        lab.serve("--stage-seconds", f"{STAGE_SECONDS:g}")
        for name in lab.names:
            lab.join(name)
        lab.wait(lambda: len(lab.rounds()) >= 1)
        network.wire.counts.clear()
        rows = [_bad(lab, network, delay, loss) for delay, loss in ((0.0, 0.0), (0.05, 0.01), (0.15, 0.05))]
        network.wire.delay, network.wire.loss = 0.02, 0.0
        rows.append(_cut(lab, network, ["site-3"], 10.0))
        rows.append(_cut(lab, network, ["site-3"], STAGE_SECONDS + DEADLINE_SECONDS + 15))
        rows.append(_cut(lab, network, [SERVER], 15.0))
        lab.wait(lambda: lab.running[SERVER].poll() is not None)
    finally:
        lab.close()
    return rows


if __name__ == "__main__":
    main()
