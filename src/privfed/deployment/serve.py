"""`privfed serve`: the server of a deployment. Sets up certificates, starts a SuperLink, registers the sites' nodes,
starts the run and shows how it goes; stops all of it cleanly."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from privfed.config import load_config
from privfed.deployment.bundle import NAME, write_bundle
from privfed.deployment.certificates import ServerFiles, lab_files
from privfed.deployment.processes import (
    STOP_SECONDS,
    Process,
    alive,
    environment,
    flower,
    run,
    shown,
    start,
    wait_for_port,
)
from privfed.errors import ConfigError, PrivfedError
from privfed.federation.sites import read_sites
from privfed.files import write_atomic

LINK = "privfed"
LOOK_SECONDS = 0.5
START_SECONDS = 600.0
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What the command line gives.

    Attributes:
        source: The run's TOML file or preset.
        settings: Overrides, ``key=value``.
        roster: The roster.
        out: The run folder.
        state: Folder for certificates, logs and Flower's own files; beside ``out`` by default.
        host: To listen at.
        port: To listen at.
        names: Names and addresses for the lab's certificate, beside ``host``.
        files: The operator's own certificate; None for a lab's.
        insecure: No TLS and no node authentication.
        resume: Continue the run in ``out``.
        seconds: Deadlines by their name in the bundle's configuration.
    """

    source: str
    settings: Sequence[str] = ()
    roster: Path
    out: Path
    state: Path
    host: str
    port: int
    names: Sequence[str] = ()
    files: ServerFiles | None = None
    insecure: bool = False
    resume: bool = False
    seconds: Mapping[str, float]


def serve(options: ServeOptions, say: Say) -> dict[str, Any]:
    """Run one training run over a SuperLink of its own, from start to end; return where the result is.

    Raises:
        PrivfedError: If the run fails, or one of Flower's processes ends.
    """
    options.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    config = load_config(options.source, options.settings)
    sites = read_sites(options.roster)
    resolved = options.state / "run.toml"
    write_atomic(resolved, config.to_toml().encode())
    say(f"Run {config.digest()[:12]} with {len(sites.cards)} sites and {len(sites.sizes)} clients.")
    say(f"Roster {sites.digest()[:12]}: every site has to have pinned the same one.")
    env = environment(options.state / "flower")
    for name in ("outcome.json", "serverapp.pid"):  # of the run before
        (options.state / name).unlink(missing_ok=True)
    with ExitStack() as stack:
        stack.enter_context(_told_by_sigterm())
        link = _superlink(options, env, say)
        stack.callback(link.stop)
        stack.callback(_end_server_app, options.state)  # the SuperLink leaves it to itself
        wait_for_port(_reach(options.host), options.port, link)
        _connection(options, env, say)
        if not options.insecure:
            _register(sites.cards, options, env, say)
        _submit(options, resolved, env, say)
        return _follow(options, link, say)


def write_app(folder: Path, source: str, settings: Sequence[str], roster: Path, say: Say) -> dict[str, Any]:
    """Write the app bundle and the resolved configuration for ``flwr run`` in a Flower deployment of one's own.

    Raises:
        ConfigError: If the configuration cannot hold.
    """
    config = load_config(source, settings)
    resolved = folder / "run.toml"
    digest = write_bundle(folder)
    write_atomic(resolved, config.to_toml().encode())
    say(f"App bundle {digest}: sites may pin it (accept.bundles).")
    given = {"config": str(resolved.resolve()), "roster": str(roster.resolve()), "out": str(Path("runs/x").resolve())}
    say(shown(["flwr", "run", str(folder / NAME), "NAME-OF-YOUR-SUPERLINK", "--run-config", _overrides(given)]))
    return {"app": str(folder / NAME), "bundle": digest}


def _overrides(given: Mapping[str, object]) -> str:
    return " ".join(f"{key}={json.dumps(value)}" for key, value in given.items())


def _superlink(options: ServeOptions, env: Mapping[str, str], say: Say) -> Process:
    command = [flower("flower-superlink"), "--host", options.host, "--port", str(options.port)]
    command += ["--database", str(options.state / "superlink.db"), "--disable-runtime-dependency-installation"]
    if options.insecure:
        say("SuperLink without TLS and without node authentication: for one machine only.")
        command.append("--insecure")
    else:
        files = _files(options)
        say(f"SuperLink with TLS; sites need the authority's certificate {files.authority}.")
        command += ["--ssl-ca-certfile", str(files.authority), "--ssl-certfile", str(files.certificate)]
        command += ["--ssl-keyfile", str(files.key), "--enable-supernode-auth"]
    say(shown(command))
    return start("The SuperLink", command, log=options.state / "superlink.log", env=env)


def _files(options: ServeOptions) -> ServerFiles:
    if options.files is not None:
        return options.files.check()
    hosts = list(dict.fromkeys([_reach(options.host), "127.0.0.1", "localhost", *options.names]))
    return lab_files(options.state / "tls", hosts)


def _reach(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host


def _connection(options: ServeOptions, env: Mapping[str, str], say: Say) -> None:
    """Write Flower's own configuration: how its commands reach the SuperLink."""
    home = Path(env["FLWR_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    lines = [f"[superlink.{LINK}]", f'address = "{_reach(options.host)}:{options.port}"']
    lines.append(
        "insecure = true" if options.insecure else f'root-certificates = "{_files(options).authority.resolve()}"'
    )
    (home / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    say(f"Flower's commands find the SuperLink as {LINK!r} with FLWR_HOME={home}")


def _register(cards: Sequence[Any], options: ServeOptions, env: Mapping[str, str], say: Say) -> None:
    """Let in the nodes of the roster's sites, and no others."""
    folder = options.state / "nodes"
    folder.mkdir(exist_ok=True)
    for number, card in enumerate(cards):
        if not card.node_key:
            raise ConfigError(f"The card of {card.name} has no node key: make it anew with privfed join --card.")
        done, key = folder / f"{number:04d}.done", folder / f"{number:04d}.pub"
        if done.exists() and key.read_text(encoding="ascii").strip() == card.node_key:
            continue
        key.write_text(card.node_key + "\n", encoding="ascii")
        command = [flower("flwr"), "supernode", "register", str(key), LINK]
        say(f"{shown(command)}    # {card.name}")
        found = run(command, env=env)
        if found.returncode and "already" not in (found.stdout + found.stderr).lower():
            raise PrivfedError(
                f"The node of {card.name} could not be registered: {(found.stdout + found.stderr).strip()}"
            )
        done.touch()


def _submit(options: ServeOptions, config: Path, env: Mapping[str, str], say: Say) -> None:
    digest = write_bundle(options.state)
    say(f"App bundle {digest}: sites may pin it (accept.bundles).")
    given: dict[str, object] = {
        "config": str(config.resolve()),
        "roster": str(options.roster.resolve()),
        "out": str(options.out.resolve()),
        "state": str(options.state.resolve()),
        "resume": options.resume,
        **options.seconds,
    }
    command = [flower("flwr"), "run", str(options.state / NAME), LINK, "--run-config", _overrides(given)]
    say(shown(command))
    found = run(command, env=env)
    if found.returncode or "uccessfully started run" not in found.stdout:
        raise PrivfedError(f"The run could not be started: {(found.stdout + found.stderr).strip()}")
    say(found.stdout.strip().splitlines()[-1])


def _follow(options: ServeOptions, link: Process, say: Say) -> dict[str, Any]:
    """Say what the ServerApp writes, until there is an outcome."""
    log, outcome, pid = (options.state / name for name in ("server.log", "outcome.json", "serverapp.pid"))
    at = log.stat().st_size if log.exists() else 0
    started = time.monotonic()
    while True:
        over = outcome.exists()
        at = _say_new(log, at, say)
        if over:
            break
        if not link.running:
            raise PrivfedError(f"The SuperLink ended; start again with --resume. {link.tail()}")
        gone = pid.exists() and not alive(int(pid.read_text() or 0))
        late = not pid.exists() and time.monotonic() - started > START_SECONDS
        if (gone or late) and not outcome.exists():
            raise PrivfedError(f"The ServerApp is gone; start again with --resume. Its log is {link.log}.")
        time.sleep(LOOK_SECONDS)
    found = json.loads(outcome.read_text(encoding="utf-8"))
    if "error" in found:
        error = PrivfedError(found["error"]["message"])
        error.exit_code = int(found["error"]["exit_code"])
        raise error
    return {"folder": found["folder"]}


@contextmanager
def _told_by_sigterm() -> Iterator[None]:
    """Take SIGTERM as Ctrl-C, so that what was started is stopped either way."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_server_app(state: Path) -> None:
    """End a ServerApp that has not come to its end: one left over could go on in the run folder."""
    file = state / "serverapp.pid"
    if (state / "outcome.json").exists() or not file.exists():
        return
    pid = int(file.read_text() or 0)
    for how in (signal.SIGTERM, signal.SIGKILL):
        if not pid or not alive(pid):
            return
        with suppress(ProcessLookupError):
            os.kill(pid, how)
        deadline = time.monotonic() + STOP_SECONDS
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.1)


def _say_new(log: Path, at: int, say: Say) -> int:
    if not log.exists():
        return at
    with log.open("rb") as file:
        file.seek(at)
        new = file.read()
    whole = new[: new.rfind(b"\n") + 1]
    for line in whole.decode("utf-8", errors="replace").splitlines():
        say(line)
    return at + len(whole)
