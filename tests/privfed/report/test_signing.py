"""Signatures of receipts, and their check: no byte can be changed, and no epsilon be stated too small."""

from __future__ import annotations

import json
import shutil
import stat

import pytest
from click.testing import CliRunner

from privfed.cli import main
from privfed.errors import ConfigError
from privfed.report.receipt import read_receipt, with_audit, write_receipt
from privfed.report.signing import canonical, make_key, signed, unsigned
from privfed.report.verify import authenticity, events_of, verify
from privfed.run import train


@pytest.fixture(scope="session")
def made():
    """The run that these tests look at, made once."""
    return {}


@pytest.fixture
def run(made, tiny_config, tmp_path_factory, tmp_path):
    """Return a copy of a signed run, and its public key."""
    if "run" not in made:
        folder = tmp_path_factory.mktemp("signed")
        config = tiny_config(reproducible_noise=False, server={"rounds": 1, "evaluate_every": 1})
        train(config, out=folder / "run")
        public = make_key(folder / "owner.pem")
        receipt = signed(read_receipt(folder / "run" / "receipt.json"), folder / "owner.pem")
        write_receipt(folder / "run" / "receipt.json", receipt)
        made["run"] = (folder / "run", public)
    source, public = made["run"]
    shutil.copytree(source, tmp_path / "run", symlinks=True)
    shutil.copy(source.resolve() / "ledger.sqlite", tmp_path / "ledger.sqlite")
    return tmp_path / "run", public


def change(folder, edit):
    """Edit a receipt and write it as privfed would, with the old signature."""
    receipt = read_receipt(folder / "receipt.json")
    edit(receipt)
    write_receipt(folder / "receipt.json", receipt)


def test_a_sound_receipt_is_verified_offline(run):
    folder, public = run
    found = verify(folder, key=public)
    assert found.mismatches == ()
    assert found.exit_code == 0
    receipt = read_receipt(folder / "receipt.json")
    for view, value in found.epsilon.items():
        assert value == pytest.approx(receipt["views"][view]["epsilon"], rel=1e-6)
    # a third party has the file alone
    alone = folder.parent / "alone.json"
    shutil.copy(folder / "receipt.json", alone)
    assert verify(alone, key=public).epsilon == found.epsilon


@pytest.mark.slow
def test_every_flipped_byte_is_noticed(run):
    folder, public = run
    path = folder / "receipt.json"
    whole = path.read_bytes()
    unnoticed = []
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(bytes(flipped))
        try:
            if not authenticity(path, public):
                unnoticed.append(position)
        except ConfigError:
            continue
    assert unnoticed == []
    assert len(whole) > 3000


@pytest.mark.parametrize("extra", [b"\n", b" "])
def test_white_space_is_noticed_too(run, extra):
    folder, public = run
    path = folder / "receipt.json"
    path.write_bytes(path.read_bytes() + extra)
    assert any("byte for byte" in each for each in verify(folder, key=public).mismatches)


def test_an_epsilon_that_is_stated_too_small_is_exit_code_4(run, made):
    folder, public = run

    def smaller(receipt):
        receipt["views"]["release"]["epsilon"] *= 0.9

    change(folder, smaller)
    found = verify(folder, key=public)
    assert found.exit_code == 4
    assert any("its events cost" in each for each in found.mismatches)
    # signing it anew does not help
    write_receipt(folder / "receipt.json", signed(read_receipt(folder / "receipt.json"), public.with_name("owner.pem")))
    assert verify(folder, key=public).exit_code == 4


def test_an_epsilon_that_is_stated_too_large_is_a_mismatch(run):
    folder, public = run

    def larger(receipt):
        receipt["views"]["release"]["epsilon"] *= 1.1

    change(folder, larger)
    assert verify(folder, key=public).exit_code == 1


def test_events_that_the_ledger_does_not_have_are_noticed(run):
    """Fewer steps, their epsilon stated right, signed by the owner: only the ledger tells."""
    folder, public = run
    from privfed.privacy.accountant import epsilon

    receipt = read_receipt(folder / "receipt.json")
    receipt["events"][0]["steps"] = 1
    cost = epsilon(events_of(receipt), receipt["views"]["release"]["delta"], fine=True)
    for entry in receipt["views"].values():
        entry["epsilon"] = cost
    write_receipt(folder / "receipt.json", signed(receipt, public.with_name("owner.pem")))
    found = verify(folder, key=public)
    assert any("no client in the ledger" in each for each in found.mismatches)
    assert any("more than any view claims" in each for each in found.mismatches)


def test_other_weights_and_another_configuration_are_noticed(run):
    folder, public = run
    weights = next((folder / "adapter").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes() + b"\0")
    (folder / "config.toml").write_text((folder / "config.toml").read_text() + "\n")
    found = " ".join(verify(folder, key=public).mismatches)
    assert "The weights in adapter/" in found
    assert "config.toml is not" in found


def test_another_key_is_not_the_owners(run, tmp_path):
    folder, public = run
    make_key(tmp_path / "other.pem")
    write_receipt(folder / "receipt.json", signed(read_receipt(folder / "receipt.json"), tmp_path / "other.pem"))
    assert verify(folder).mismatches == ()
    assert any("not by the one in" in each for each in verify(folder, key=public).mismatches)


def test_an_audit_takes_the_signature_off(run):
    folder, _ = run
    receipt = read_receipt(folder / "receipt.json")
    found = with_audit(receipt, {"release": {"empirical_epsilon": 1.5}})
    assert "signature" not in found
    assert found["views"]["release"]["empirical_epsilon"] == 1.5
    assert canonical(found) != canonical(receipt)
    assert canonical(unsigned(receipt)) == canonical(receipt)


def test_an_attack_above_the_claim_is_exit_code_4(run):
    folder, public = run
    receipt = with_audit(read_receipt(folder / "receipt.json"), {"release": {"empirical_epsilon": 50.0}})
    write_receipt(folder / "receipt.json", signed(receipt, public.with_name("owner.pem")))
    found = verify(folder, key=public)
    assert found.exit_code == 4
    assert any("an attack proved at least 50" in each for each in found.mismatches)


def test_the_commands(run, tmp_path):
    folder, _ = run
    key = tmp_path / "new.pem"
    done = CliRunner().invoke(main, ["report", str(folder), "--sign", str(key), "--new-key"])
    assert done.exit_code == 0, done.output
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    checked = CliRunner().invoke(main, ["report", str(folder), "--verify", "--key", f"{key}.pub", "--json"])
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.stdout)["ok"] is True
    again = CliRunner().invoke(main, ["report", str(folder), "--sign", str(key), "--new-key"])
    assert again.exit_code == 2
    assert "There is a key" in again.stderr
    wrong = CliRunner().invoke(main, ["report", str(folder), "--sign", str(folder / "config.toml")])
    assert wrong.exit_code == 2
    assert "--new-key" in wrong.stderr
    mixed = CliRunner().invoke(main, ["report", str(folder), "--key", f"{key}.pub"])
    assert mixed.exit_code == 2
    change(folder, lambda receipt: receipt.pop("signature"))
    bare = CliRunner().invoke(main, ["report", str(folder), "--verify"])
    assert bare.exit_code == 1
    assert "is not signed" in bare.stdout


def test_a_key_that_is_not_there_is_said_to_be_missing(run, tmp_path):
    folder, _ = run
    receipt = read_receipt(folder / "receipt.json")
    with pytest.raises(ConfigError, match=r"There is no key .*none\.pem: make one with --new-key"):
        signed(receipt, tmp_path / "none.pem")
    with pytest.raises(ConfigError, match=r"There is no key .*none\.pub: pass the \.pub file"):
        verify(folder, key=tmp_path / "none.pub")
    (tmp_path / "text.pem").write_text("no key")
    with pytest.raises(ConfigError, match="is not a private key"):
        signed(receipt, tmp_path / "text.pem")
