"""Certificates, site files, rosters and cards."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from privfed.config import RunConfig
from privfed.deployment.certificates import lab_files, node_keys
from privfed.deployment.join import opened_site
from privfed.deployment.processes import alive
from privfed.deployment.site_config import read_site
from privfed.errors import ConfigError
from privfed.federation.engines.flower.enrol import SiteKeys, make_card
from privfed.federation.engines.flower.envelope import Ask, Reply
from privfed.federation.sites import Sites, read_sites

SITE = """
name = "north"
state = "north"
part = [0, 2]
insecure = true
[caps]
epsilon = 3.0
[accept]
models = ["minilm"]
"""


def test_a_labs_certificate_is_the_authoritys_and_names_its_hosts(tmp_path: Path) -> None:
    files = lab_files(tmp_path, ["127.0.0.1", "fl.example.org"])
    authority, server = (x509.load_pem_x509_certificate(p.read_bytes()) for p in (files.authority, files.certificate))
    policy = PolicyBuilder().store(Store([authority]))
    assert policy.build_server_verifier(x509.DNSName("fl.example.org")).verify(server, [])
    with pytest.raises(VerificationError):
        policy.build_server_verifier(x509.DNSName("other.example.org")).verify(server, [])
    other = x509.load_pem_x509_certificate(lab_files(tmp_path / "other", ["127.0.0.1"]).authority.read_bytes())
    with pytest.raises(VerificationError):
        PolicyBuilder().store(Store([other])).build_server_verifier(x509.DNSName("fl.example.org")).verify(server, [])
    assert stat.S_IMODE(files.key.stat().st_mode) == 0o600
    before = files.certificate.read_bytes()
    assert lab_files(tmp_path, ["127.0.0.1"]).certificate.read_bytes() == before


def test_a_nodes_keys_are_made_once_and_fit_each_other(tmp_path: Path) -> None:
    path, public = node_keys(tmp_path)
    private = load_ssh_private_key(path.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.public_key() == load_ssh_public_key(public.encode())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert node_keys(tmp_path) == (path, public)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("part = [0, 2]", ""), "expected either part"),
        (("insecure = true", ""), "expected either root_certificates"),
        (("epsilon = 3.0", "epsilom = 3.0"), "Did you mean 'epsilon'"),
        (("epsilon = 3.0", "epsilon = -1.0"), "caps.epsilon"),
        (("name =", "name"), "cannot be read as TOML"),
    ],
)
def test_a_site_file_that_cannot_hold_is_one_sentence(change: tuple[str, str], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(SITE)
    assert read_site(path).policy.accept.models == ["minilm"]
    path.write_text(SITE.replace(*change))
    with pytest.raises(ConfigError, match=sentence):
        read_site(path)


def test_cards_make_a_roster_that_every_party_reads_alike(
    tmp_path: Path, tiny_config: Callable[..., RunConfig]
) -> None:
    config = tiny_config()
    cards = [make_card(config, f"s{i}", SiteKeys.load(tmp_path / f"s{i}"), part=(i, 2)) for i in (0, 1)]
    for name, order in (("a", cards), ("b", cards[::-1])):
        (tmp_path / name).write_text("\n".join(card.to_toml() for card in order))
    one, two = read_sites(tmp_path / "a"), read_sites(tmp_path / "b")
    assert one.digest() == two.digest()
    assert sum(one.sizes.values()) == 198
    assert set(one.site_of.values()) == {"s0", "s1"}
    again = make_card(config, "s0", SiteKeys.load(tmp_path / "s0"), part=(0, 2))
    assert again == cards[0]
    with pytest.raises(ConfigError, match="twice"):
        Sites(cards=(cards[0], cards[0]))
    (tmp_path / "a").write_text(cards[0].to_toml().replace(cards[0].identity, "00ff"))
    with pytest.raises(ConfigError, match="expected a public key of 32 bytes"):
        read_sites(tmp_path / "a")


def test_a_sites_secret_is_its_own(tmp_path: Path) -> None:
    one, two = SiteKeys.load(tmp_path / "a"), SiteKeys.load(tmp_path / "b")
    assert SiteKeys.load(tmp_path / "a") == one
    assert one.identity.public != two.identity.public
    assert one.client("x").public != one.client("y").public
    assert stat.S_IMODE((tmp_path / "a" / "site.secret").stat().st_mode) == 0o600
    assert one.secret.hex() not in repr(one)


def test_a_process_that_has_ended_is_not_alive_even_before_its_parent_looks() -> None:
    """Flower does not look: a ServerApp that was killed would count as running for good."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert alive(process.pid)
        process.kill()
        deadline = time.monotonic() + 60
        while alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not alive(process.pid)
        assert process.returncode is None  # nobody has read how it ended: it is still in the process table
    assert not alive(process.pid)


@pytest.mark.slow
def test_a_site_answers_at_a_socket_and_stops_cleanly(tmp_path: Path, tiny_config: Callable[..., RunConfig]) -> None:
    client_app = pytest.importorskip(
        "privfed.federation.engines.flower.client_app", reason="Flower is not installed: pip install 'privfed[flower]'"
    )
    card = make_card(tiny_config(), "north", SiteKeys.load(tmp_path / "north"), part=(0, 2))
    (tmp_path / "roster.toml").write_text(card.to_toml())
    (tmp_path / "north.toml").write_text(SITE)
    path = tmp_path / "s"
    command = [sys.executable, "-m", "privfed.cli", "join", "north.toml", "--socket", str(path)]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 400
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            ask = Ask(kind="hello", run_id="", body={"nonce": b"1"}).to_bytes()
            reply = Reply.from_bytes(client_app.ask_socket(path, ask), ask, {"north": bytes.fromhex(card.identity)})
            assert reply.status == "ok"
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
        assert process.stderr is not None
        assert "privfed-site=" in process.stderr.read()
    assert not path.exists()


def test_a_site_with_other_keys_than_the_rosters_does_not_start(
    tmp_path: Path, tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    card = make_card(tiny_config(), "north", SiteKeys.load(tmp_path / "elsewhere"), part=(0, 2))
    (tmp_path / "roster.toml").write_text(card.to_toml())
    (tmp_path / "north.toml").write_text(SITE)
    with (
        pytest.raises(ConfigError, match="pins other keys for north"),
        opened_site(read_site(tmp_path / "north.toml"), lambda _line: None),
    ):
        pass
