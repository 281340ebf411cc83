"""Messages as Flower's records, small and in chunks."""

from __future__ import annotations

import hashlib

import pytest

from privfed.errors import MessageError

flwr_app = pytest.importorskip("flwr.app", reason="Flower is not installed: pip install 'privfed[flower]'")

SMALL, LARGE = 2**18, 4 * 2**20


@pytest.mark.parametrize("size", [0, 1, SMALL, SMALL + 1, LARGE, 2 * LARGE + 3])
def test_a_message_comes_back_as_it_was(size: int) -> None:
    from privfed.federation.engines.flower.records import from_records, to_records

    message = hashlib.shake_256(b"message").digest(size)
    records = to_records(message)
    assert from_records(records) == message
    assert (len(records) == 1) is (size <= SMALL)  # what Flower carries on its own, each asked for at every hop


@pytest.mark.parametrize("size", [100, SMALL + 100])
def test_a_damaged_message_is_one_sentence(size: int) -> None:
    from privfed.federation.engines.flower.records import from_records, to_records

    message = bytes(size)
    for change in ({"sha256": "0" * 64}, {"bytes": size - 1}):
        records = to_records(message)
        records["privfed.head"] = flwr_app.ConfigRecord({**records["privfed.head"], **change})
        with pytest.raises(MessageError, match="damaged on its way"):
            from_records(records)
    records["privfed.head"] = flwr_app.ConfigRecord({"bytes": -1})
    with pytest.raises(MessageError, match="claims -1 bytes"):
        from_records(records)
    with pytest.raises(MessageError, match="did not make"):
        from_records(flwr_app.RecordDict({}))
    other = flwr_app.RecordDict({"privfed.head": flwr_app.MetricRecord({"bytes": 1})})
    with pytest.raises(MessageError, match="other kinds"):
        from_records(other)
