"""Kill every party of a real deployment once, and say what it cost.

    python benchmarks/flower_faults.py [FOLDER] [RUN.TOML|PRESET] [privfed overrides, such as -s server.rounds=8]

Four sites on loopback with TLS and node authentication. After each stage of a round one site is killed (SIGKILL) and
started again; then the ServerApp, then the SuperLink, each followed by `privfed serve --resume`. In the end each ledger
is verified and searched for charges that were made twice.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from privfed.deployment.processes import free_port
from privfed.privacy.ledger import Ledger

PRIVFED = [sys.executable, "-m", "privfed.cli"]
SITES = 4
STAGES = ("train", "agree", "unmask")
Process = subprocess.Popen[bytes]


class Lab:
    """The deployment's files and processes."""

    def __init__(self, folder: Path, source: str, settings: list[str]) -> None:
        self.folder, self.port = folder, free_port()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        own = [
            "-s",
            "privacy.reproducible_noise=true",
            "-s",
            f"partition.clients={SITES}",
            "-s",
            "client.deadline_s=60.0",
        ]
        shown = subprocess.run([*PRIVFED, "config", "show", source, *own, *settings], capture_output=True, check=True)
        (folder / "run.toml").write_bytes(shown.stdout)
        model = json.dumps(_table(folder / "run.toml", "model")["name"])
        for number in range(SITES):
            text = (
                f'name = "site-{number}"\nsuperlink = "127.0.0.1:{self.port}"\nstate = "site-{number}"\n'
                f'root_certificates = "server/tls/ca.pem"\npart = [{number}, {SITES}]\n'
                f"[accept]\nmodels = [{model}]\nreproducible_noise = true\n"
            )
            (folder / f"site-{number}.toml").write_text(text)
            subprocess.run([*PRIVFED, "join", f"site-{number}.toml", "--card", "run.toml"], cwd=folder, check=True)
        cards = [(folder / f"site-{number}.card.toml").read_text() for number in range(SITES)]
        (folder / "roster.toml").write_text("\n".join(cards))
        self.sites: dict[int, Process] = {}

    def start(self, log: str, *arguments: str) -> Process:
        with (self.folder / log).open("ab") as out:
            return subprocess.Popen([*PRIVFED, *arguments], cwd=self.folder, stdout=out, stderr=subprocess.STDOUT)

    def serve(self, *options: str) -> Process:
        given = ["--roster", "roster.toml", "-o", "run", "--state", "server", "--port", str(self.port)]
        return self.start("serve.log", "serve", "run.toml", *given, "--stage-seconds", "30", *options)

    def join(self, number: int) -> None:
        self.wait(lambda: (self.folder / "server" / "tls" / "server.pem").exists())
        self.sites[number] = self.start(f"site-{number}.log", "join", f"site-{number}.toml")

    def lines(self, path: str) -> list[dict[str, object]]:
        file = self.folder / path
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def rounds(self) -> list[dict[str, object]]:
        return [line for line in self.lines("run/metrics.jsonl") if line["kind"] == "round"]

    def asked(self, number: int, kind: str) -> int:
        return sum(1 for line in self.lines(f"site-{number}/site.jsonl") if line["asked"] == kind)

    def wait(self, done: Callable[[], bool], seconds: float = 1200.0) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError((self.folder / "serve.log").read_text()[-3000:])
            time.sleep(0.05)

    def close(self) -> None:
        for process in self.sites.values():
            process.terminate()


def _table(path: Path, name: str) -> dict[str, object]:
    import tomllib

    found: dict[str, object] = tomllib.loads(path.read_text())[name]
    return found


def _kill_site(lab: Lab, number: int, stage: str) -> str:
    """Kill a site as soon as it has answered a stage, start it again, and return what the next rounds say."""
    before, done = lab.asked(number, stage), len(lab.rounds())
    lab.wait(lambda: lab.asked(number, stage) > before)
    lab.sites[number].kill()
    lab.sites[number].wait()
    lab.join(number)
    lab.wait(lambda: len(lab.rounds()) > done and lab.rounds()[-1]["survivors"] == SITES and _opened(lab, number))
    after = lab.rounds()[done:]
    return ", ".join(f"round {r['round']}: {'lost' if r['lost'] else r['survivors']}" for r in after)


def _opened(lab: Lab, number: int) -> bool:
    """Return whether the site's last run of the program has answered a whole round."""
    lines = lab.lines(f"site-{number}/site.jsonl")
    opened = max((i for i, line in enumerate(lines) if line["asked"] == "open"), default=-1)
    return any(line["asked"] == "unmask" and line["status"] == "ok" for line in lines[opened + 1 :])


def _kill_server(lab: Lab, server: Process, which: str) -> tuple[Process, str]:
    """Kill the ServerApp or the SuperLink in the middle of a round, resume, and return what was said."""
    done = len(lab.rounds())
    before = lab.asked(0, "agree")
    lab.wait(lambda: lab.asked(0, "agree") > before)
    if which == "ServerApp":
        os.kill(int((lab.folder / "server" / "serverapp.pid").read_text()), signal.SIGKILL)
    else:
        found = subprocess.run(
            ["pgrep", "-P", str(server.pid), "-f", "flower-superlink"], capture_output=True, text=True
        )
        os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
    code = server.wait()
    server = lab.serve("--resume")
    lab.wait(lambda: len(lab.rounds()) > done + 1)
    again = lab.rounds()[done]
    return server, f"serve ended with {code}; resumed, round {again['round']}: {again['survivors']}"


def main() -> None:
    """Run it and print the table."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/flower-faults")
    source = str(Path(sys.argv[2]).resolve()) if len(sys.argv) > 2 and Path(sys.argv[2]).exists() else "tiny"
    lab = Lab(folder, source, sys.argv[3:] or ["-s", "server.rounds=24", "-s", "server.cohort_size=4"])
    rows = []
    try:
        server = lab.serve()
        for number in range(SITES):
            lab.join(number)
        lab.wait(lambda: len(lab.rounds()) >= 1)
        for number, stage in enumerate(STAGES):
            rows.append((f"site {number}, after it answered `{stage}`", _kill_site(lab, number, stage)))
            print(rows[-1], flush=True)
        for which in ("ServerApp", "SuperLink"):
            server, told = _kill_server(lab, server, which)
            rows.append((f"the {which}, in the middle of a round", told))
            print(rows[-1], flush=True)
        server.wait()
    finally:
        lab.close()
    print("\n| killed | clients in the sums that followed |\n|---|---|")
    for row in rows:
        print(f"| {row[0]} | {row[1]} |")
    for number in range(SITES):
        with Ledger.open(folder / f"site-{number}" / "ledger.sqlite") as ledger:
            keys = [(e.charge.client_id, e.charge.phase, e.charge.round) for e in ledger.entries()]
            twice = len(keys) - len(set(keys))
            print(f"site {number}: ledger sound: {not ledger.verify()}, {len(keys)} charges, {twice} made twice")
    print(f"rounds: {len(lab.rounds())}, receipt written: {(folder / 'run' / 'receipt.json').exists()}")


if __name__ == "__main__":
    main()
