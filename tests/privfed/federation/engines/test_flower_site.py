"""What a site refuses, asked through Flower's own ClientApp: every sentence with the reason, and nothing charged."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from privfed import __version__
from privfed.config import RunConfig
from privfed.errors import AuthenticityError
from privfed.federation.engines.flower.envelope import Ask, Reply
from privfed.federation.engines.flower.policy import Caps
from privfed.federation.engines.flower.site import Site
from privfed.federation.progress import Silent

from .deployment import Lab, LabChannel

flwr_app = pytest.importorskip("flwr.app", reason="Flower is not installed: pip install 'privfed[flower]'")
SITE = "site-0"


class Node:
    """Asks a site through the ClientApp, as a SuperNode's process would: over a Unix socket."""

    def __init__(self, site: Site, path: Path) -> None:
        from privfed.federation.engines.flower import client_app

        self._app = client_app
        self._path = path
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(str(path))
        self._listening.listen()
        self._thread = threading.Thread(target=self._serve, args=(site,), daemon=True)
        self._thread.start()

    def _serve(self, site: Site) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection:
                self._app.send(connection, site.handle(self._app.receive(connection)))

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(5)

    def ask(self, ask: bytes) -> bytes:
        from flwr.supercore.task_identity import TaskIdentity

        from privfed.federation.engines.flower.records import from_records, to_records

        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # as Flower's process sets them
        message = flwr_app.Message(content=to_records(ask), dst_node_id=1, message_type="train.privfed")
        message.metadata.__dict__["_message_id"] = "7"
        context = flwr_app.Context(
            run_id=1,
            node_id=1,
            node_config={"privfed-site": str(self._path)},
            state=flwr_app.RecordDict(),
            run_config={},
        )
        return from_records(self._app.app(message, context).content)


@pytest.fixture
def asking(tmp_path: Path) -> Iterator[Callable[..., Callable[[Ask], Reply]]]:
    """Return ``asking(lab)``: a function from an ask to the site's reply, through the ClientApp."""
    nodes: list[Node] = []

    def make(lab: Lab) -> Callable[[Ask], Reply]:
        node = Node(lab.running[SITE][0], tmp_path / f"{len(nodes)}.socket")
        nodes.append(node)

        def ask(asked: Ask) -> Reply:
            raw = asked.to_bytes()
            return Reply.from_bytes(node.ask(raw), raw, lab.sites.site_identities)

        return ask

    yield make
    for node in nodes:
        node.close()


@pytest.fixture
def lab(tmp_path: Path, tiny_config: Callable[..., RunConfig]) -> Iterator[Lab]:
    """Two sites of two clients each, with a cap of epsilon 9 and one of 5 for project ``pilot``."""
    caps = Caps(epsilon=9.0, delta=1e-4, projects={"default": 90.0, "pilot": 5.0})
    found = Lab(tiny_config(), 2, tmp_path / "lab", accept={"min_cohort": 3}, caps=caps)
    yield found
    found.close()


def _open(lab: Lab, config: RunConfig, run_id: str = "r" * 8, **changes: Any) -> Ask:
    body = {"config": config.to_toml(), "roster": lab.sites.digest(), "classes": [], "version": __version__, **changes}
    return Ask(kind="open", run_id=run_id, body=body)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a model that is not on the list": ({"model": {"name": "minilm"}}, "is not on this site's list"),
    "more epsilon than the cap": ({"privacy": {"target_epsilon": 12.0}}, "the cap is 9"),
    "more than the project's cap": ({"ledger": {"project": "pilot"}}, "this site's cap for it is 5"),
    "a project without a cap": ({"ledger": {"project": "other"}}, "has no cap at this site"),
    "a cohort below the minimum": (
        {"server": {"cohort_size": 2}, "secagg": {"corrupt": 0.0}},
        "below this site's minimum",
    ),
    "no secure aggregation": ({"secagg": {"name": "none"}}, "under secure aggregation only"),
    "no privacy": ({"privacy": {"unit": "none", "target_epsilon": None}}, "in protected runs only"),
    "noise of the server": (
        {"privacy": {"unit": "client", "noise_multiplier": 1.0, "target_epsilon": None}, "server": {"cohort_size": 4}},
        "the noise is the server's to add",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_site_refuses_what_it_did_not_agree_to(
    case: str, lab: Lab, asking: Callable[..., Any], tiny_config: Callable[..., RunConfig]
) -> None:
    tables, sentence = REFUSED[case]
    reply = asking(lab)(_open(lab, tiny_config(**tables)))
    assert reply.status == "refused"
    assert sentence in reply.reason
    assert lab.ledger(SITE).entries() == []


def test_noise_that_anyone_can_compute_is_refused_by_default(
    tmp_path: Path, asking: Callable[..., Any], tiny_config: Callable[..., RunConfig]
) -> None:
    lab = Lab(tiny_config(), 2, tmp_path / "strict", accept={"reproducible_noise": False})
    reply = asking(lab)(_open(lab, tiny_config()))
    assert reply.status == "refused"
    assert "noise that anyone can compute" in reply.reason
    lab.close()


def test_another_roster_and_another_version_are_refused(
    lab: Lab, asking: Callable[..., Any], tiny_config: Callable[..., RunConfig]
) -> None:
    ask = asking(lab)
    assert "another roster" in ask(_open(lab, tiny_config(), roster="0" * 64)).reason
    assert "runs privfed '0.0.0'" in ask(_open(lab, tiny_config(), version="0.0.0")).reason


def test_a_site_that_has_not_opened_a_run_answers_nothing_of_it(lab: Lab, asking: Callable[..., Any]) -> None:
    ask = asking(lab)
    for kind in ("keys", "shares", "train", "agree", "unmask", "close"):
        assert ask(Ask(kind=kind, run_id="r" * 8)).status == "unopened"


def test_a_reply_is_worth_nothing_as_the_reply_to_another_message(lab: Lab) -> None:
    site = lab.running[SITE][0]
    first, second = (Ask(kind="hello", run_id="", body={"nonce": bytes([n])}).to_bytes() for n in (1, 2))
    raw = site.handle(first)
    assert Reply.from_bytes(raw, first, lab.sites.site_identities).site == SITE
    with pytest.raises(AuthenticityError, match="not signed"):
        Reply.from_bytes(raw, second, lab.sites.site_identities)
    with pytest.raises(AuthenticityError, match="not signed"):
        Reply.from_bytes(raw, first, {SITE: lab.sites.site_identities["site-1"]})


def test_flowers_own_client_process_never_loads_torch() -> None:
    code = (
        "import sys, privfed.federation.engines.flower.client_app;"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_app_bundle_that_is_not_on_the_list_gets_no_answer() -> None:
    """The site's own process takes Flower's tasks: it answers for pinned bundles only, and runs none."""
    from flwr.supercore.task_identity import TaskIdentity

    from privfed.federation.engines.flower.node import NodeTasks
    from privfed.federation.engines.flower.records import to_records

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    message = flwr_app.Message(content=to_records(b"ask"), dst_node_id=1, message_type="train.privfed")
    message.metadata.__dict__["_message_id"] = "7"
    asked: list[bytes] = []

    def handle(raw: bytes) -> bytes:
        asked.append(raw)
        return b"reply"

    bundle = b"raise SystemExit"
    pinned = hashlib.sha256(bundle).hexdigest()
    for accepted, answered in ((["0" * 64], False), ([pinned], True), ([], True)):
        asked.clear()
        tasks = NodeTasks("127.0.0.1:1", handle, accepted, Silent())
        reply = tasks.reply(message, bundle)
        assert reply.has_error() is not answered
        assert asked == ([b"ask"] if answered else [])
        if not answered:
            assert f"The app bundle {pinned} is not on this site's list" in reply.error.reason


@pytest.mark.slow
def test_a_replayed_round_a_narrowed_cohort_and_a_bare_update_are_refused(
    lab: Lab, asking: Callable[..., Any], tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    from privfed.federation.engines.flower.engine import FlowerEngine
    from privfed.federation.engines.flower.fleet import Deadlines
    from privfed.run import train

    config = tiny_config()
    deadlines = Deadlines(stage=0.05, opening=900.0, patience=900.0)
    # the run's end would close it at the sites: it is asked of them before that
    lab.broken = lambda _site, ask, _lab: ask.kind == "close"
    train(
        config, out=tmp_path / "run", engine=FlowerEngine(sites=lab.sites, channel=LabChannel(lab), deadlines=deadlines)
    )
    ask, spent = asking(lab), len(lab.ledger(SITE).entries())
    heard = [asked for site, asked in lab.asks if site == SITE]
    keys = next(asked for asked in heard if asked.kind == "keys")
    training = [asked for asked in heard if asked.kind == "train" and "shares" in asked.body]
    assert "sessions do not repeat" in ask(keys).reason
    later = [asked for asked in heard if asked.kind in ("shares", "agree", "unmask")]
    assert {asked.kind for asked in later} == {"shares", "agree", "unmask"}
    for asked in (*training, *later):  # none of it a second time: no update, no signature, no share
        reply = ask(asked)
        assert reply.status == "refused" or not reply.body["messages"]
    bare = Ask(kind="train", run_id=keys.run_id, body={**training[-1].body, "shares": {}, "clients": ["client-0"]})
    assert "without a mask" in ask(bare).body["errors"]["client-0"]
    mixed = Ask(kind="train", run_id=keys.run_id, body={**training[-1].body, "clients": ["client-0", "client-2"]})
    some = next(iter(training[-1].body["shares"]))
    mixed.body["shares"] = {some: training[-1].body["shares"][some]}  # type: ignore[index]
    assert ask(mixed).body.get("messages", {}) == {}
    phase, number, attempt, cohort, values = keys.body["session"]
    narrowed = Ask(
        kind="keys", run_id=keys.run_id, body={"session": [phase, number, attempt + 99, cohort[:-1], values]}
    )
    assert "follow from the run's seed" in ask(narrowed).reason
    again = ask(_open(lab, config, run_id="s" * 8))  # another run, which the cap would have allowed as the first one
    assert again.status == "refused"
    assert "the cap is 9" in again.reason
    assert len(lab.ledger(SITE).entries()) == spent
