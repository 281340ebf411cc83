"""What a recorded run leaves, what it does not leave, and what becomes of it when a run is killed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.compression.message import to_bytes
from privfed.errors import ConfigError
from privfed.federation.recorder import DIGEST
from privfed.federation.transcript import Transcript, TranscriptError
from privfed.run import train

PLAIN = {"privacy": {"unit": "none", "target_epsilon": None}}
EXAMPLE = {"privacy": {"target_epsilon": None, "noise_multiplier": 1.0, "accountant": "rdp"}}
UNMASKED = {"secagg": {"name": "none"}}


@pytest.fixture
def recorded(tiny_config: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[Path, Mapping[str, Any]]]:
    """Return ``recorded(name, **tables)``: a finished, recorded run's folder and receipt."""

    def run(name: str = "run", *, record: bool = True, **tables: Any) -> tuple[Path, Mapping[str, Any]]:
        ledger = {"path": str(tmp_path / f"{name}.sqlite")}
        config = tiny_config(audit={"record": record}, ledger=ledger, **{**PLAIN, **tables})
        result = train(config, out=tmp_path / name)
        return result.folder, result.receipt

    return run


def test_without_record_nothing_is_kept(recorded: Callable[..., Any]) -> None:
    folder, receipt = recorded(record=False, **UNMASKED)
    assert not (folder / "transcript").exists()
    assert not any("recorded" in note for note in receipt["notes"])
    with pytest.raises(TranscriptError, match=r"was not recorded: train it with -s audit\.record=true"):
        Transcript(folder)


def test_unmasked_messages_average_to_what_the_server_applied(recorded: Callable[..., Any]) -> None:
    folder, receipt = recorded(**UNMASKED)
    transcript = Transcript(folder)
    records = list(transcript.rounds())
    assert [(r.phase, r.round) for r in records] == [("train", 1), ("train", 2)]
    releases = list(transcript.releases(every_iterate=True))
    for record, release in zip(records, releases, strict=True):
        assert len(record.clients) == 3 == len(record.survivors)
        assert record.total is None
        updates = [transcript.update(record, client) for client in record.clients]
        assert not np.array_equal(updates[0], updates[1])
        mean_D = transcript.mean(record)
        assert mean_D is not None
        np.testing.assert_allclose(np.mean(updates, axis=0), mean_D, rtol=1e-4, atol=1e-7)
        moved_D = np.concatenate([release.change[name].ravel() for name in record.sent.names])
        # the server's learning rate is 1
        np.testing.assert_allclose(moved_D, mean_D, rtol=1e-3, atol=1e-6)
    notes = " ".join(receipt["notes"])
    assert "message of every single client, without noise" in notes
    assert "was recorded for audits" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_recorded_message_is_the_one_that_was_sent(federation: Callable[..., Any], tmp_path: Path) -> None:
    from dataclasses import replace

    from privfed.federation.recorder import PhaseFacts, Recorder, round_name
    from privfed.federation.transcript import _round

    made = federation(**UNMASKED)
    layout = made.phase.layout
    facts = PhaseFacts(
        run_id="run", phase="train", layout=layout, shared=layout, extra=0, ring=None, noise_multiplier=1.0
    )
    sent: list[bytes] = []

    class Spy:
        """Encodes and keeps the bytes."""

        def __init__(self, client: Any) -> None:
            self.client = client
            self.shard, self.weight, self.mechanism, self.shares = client.shard, client.weight, None, None

        def respond(self, *arguments: Any) -> Any:
            encoded = self.client.respond(*arguments)
            sent.append(to_bytes(encoded, client_id=self.shard.client_id, weight=self.weight))
            return encoded

    spies = {name: Spy(client) for name, client in made.phase.clients.items()}
    made.phase = replace(made.phase, clients=spies, recorder=Recorder(tmp_path / "transcript" / "train", facts))
    made.round()
    record = _round(tmp_path / "transcript" / "train" / round_name(1), "train")
    assert list(record.messages) == sent
    assert len(sent) == 3


def test_a_masked_run_keeps_sums_only(recorded: Callable[..., Any]) -> None:
    folder, receipt = recorded(secagg={"name": "masked"})
    twin, _ = recorded("twin", **UNMASKED)
    transcript, open_one = Transcript(folder), Transcript(twin)
    for record, single in zip(transcript.rounds(), open_one.rounds(), strict=True):
        assert record.clients == () == record.messages
        assert record.total is not None
        mean_D = transcript.mean(record)
        assert mean_D is not None
        updates = {client: open_one.update(single, client) for client in single.clients}
        if record.round == 1:  # from then on the broadcasts differ in their last bits, and the batches drawn with them
            np.testing.assert_allclose(np.mean(list(updates.values()), axis=0), mean_D, rtol=1e-3, atol=1e-5)
        with pytest.raises(ConfigError, match="has no message of"):
            transcript.update(record, single.clients[0])
        # nor does any client's update lie somewhere in the file, in float32 or on the wire
        data = b"".join(path.read_bytes() for path in sorted((folder / "transcript" / "train").glob("*")))
        for update_D in updates.values():
            assert update_D[:16].tobytes() not in data
    assert "no client's own message" in " ".join(receipt["notes"])


def test_under_example_level_privacy_the_messages_have_their_noise(recorded: Callable[..., Any]) -> None:
    loud, receipt = recorded("loud", **UNMASKED, privacy={**EXAMPLE["privacy"], "noise_multiplier": 20.0})
    quiet, _ = recorded("quiet", **UNMASKED, privacy={**EXAMPLE["privacy"], "noise_multiplier": 0.5})
    sizes = []
    for folder in (loud, quiet):
        transcript = Transcript(folder)
        record = next(transcript.rounds())
        sizes.append(np.linalg.norm(transcript.update(record, record.clients[0])))
    assert sizes[0] > 10 * sizes[1]
    assert "with the noise that the clients added" in " ".join(receipt["notes"])
    assert Transcript(loud).public("train")["noise_multiplier"] == pytest.approx(20.0)


def test_under_client_level_privacy_the_sum_is_the_one_before_the_noise(recorded: Callable[..., Any]) -> None:
    privacy = {"unit": "client", "target_epsilon": None, "noise_multiplier": 50.0, "accountant": "rdp"}
    folder, receipt = recorded(privacy=privacy, partition={"name": "iid", "clients": 24}, server={"cohort_size": 20})
    transcript = Transcript(folder)
    records = [record for record in transcript.rounds() if record.lost is None]
    assert records
    for record in records:
        mean_D = transcript.mean(record)
        # clipped to 0.5, and the noise of the release would be fifty times that
        assert mean_D is None or np.linalg.norm(mean_D) <= 0.51
    released = [
        np.linalg.norm(np.concatenate([v.ravel() for v in r.change.values()]))
        for r in transcript.releases(every_iterate=True)
    ]
    assert max(released) > 5
    assert "before the server added its noise" in " ".join(receipt["notes"])


@pytest.mark.parametrize("tables", [UNMASKED, {"secagg": {"name": "masked"}}])
def test_a_resumed_run_is_recorded_like_an_unbroken_one(
    tables: Mapping[str, Any], recorded: Callable[..., Any], tiny_config: Callable[..., Any], tmp_path: Path
) -> None:
    from privfed.federation.engines import in_process

    server = {"rounds": 3, "evaluate_every": 3}
    whole, _ = recorded("whole", server=server, **tables)
    config = tiny_config(
        audit={"record": True}, ledger={"path": str(tmp_path / "whole.sqlite")}, server=server, **PLAIN, **tables
    )
    real = in_process.save_checkpoint

    def crash(path: Path, checkpoint: Any) -> None:
        if checkpoint.state.round == 2:  # the record of round 2 is written, its checkpoint is not
            raise KeyboardInterrupt
        real(path, checkpoint)

    broken = tmp_path / "broken"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_process, "save_checkpoint", crash)
        with pytest.raises(KeyboardInterrupt):
            train(config, out=broken)
    stale = broken / "transcript" / "train" / "000002.msgpack"
    stale.write_bytes(b"half a record")
    train(config, out=broken, resume=True)
    first, second = Transcript(whole), Transcript(broken)
    assert first.digests() == second.digests()
    assert len(first.digests()) == 3 + 2


def test_damage_is_found(recorded: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = recorded(**UNMASKED)
    for change, message in ((_flipped, "is damaged"), (Path.unlink, "Round 1 of the phase 'train' is missing")):
        copy = tmp_path / change.__name__
        shutil.copytree(folder, copy, symlinks=True)
        change(copy / "transcript" / "train" / "000001.msgpack")
        with pytest.raises(TranscriptError, match=message):
            list(Transcript(copy).rounds())


def _flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[DIGEST + 100] ^= 1
    path.write_bytes(bytes(data))


def test_what_is_public_does_not_say_where_the_data_are(recorded: Callable[..., Any], text_csv: Path) -> None:
    folder, _ = recorded(**UNMASKED)
    public = Transcript(folder).public("train")
    assert str(text_csv) not in repr(public)
    assert public["clients"] == 4
    assert public["client"].local_steps == 2
    assert public["label_names"] == tuple(json.loads((folder / "partition.json").read_text())["label_names"])


def test_the_rebuilt_run_starts_from_what_was_broadcast(recorded: Callable[..., Any]) -> None:
    folder, _ = recorded(**UNMASKED, head_warm_start={"name": "dp_probe", "rounds": 1})
    transcript = Transcript(folder)
    assert transcript.phases == ("warm_start", "train")
    records = list(transcript.rounds())
    assert [(r.phase, r.round) for r in records] == [("warm_start", 1), ("train", 1), ("train", 2)]
    for record in records:
        params = transcript.params(record)
        assert set(record.sent.names) <= set(params)
