"""The ledger: what it costs, what it refuses, and that neither a crash nor an edit goes unnoticed."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from privfed.errors import BudgetExceededError, ConfigError, LedgerError
from privfed.privacy import ledger_cost
from privfed.privacy.accountant import epsilon
from privfed.privacy.ledger import Cap, Charge, Ledger
from privfed.privacy.ledger_store import COLUMNS
from privfed.types import PrivacyEvent

DELTA = 1e-5
DATA = "d" * 64


def event(q=0.05, sigma=1.0, steps=10, **more):
    more.setdefault("unit", "example")
    return PrivacyEvent(noise_multiplier=sigma, sampling_probability=q, steps=steps, **more)


def charge(number=0, *, client="a", run="r", partition="p", data=DATA, what=None, **more):
    return Charge(
        run_id=run,
        data_digest=data,
        partition_digest=partition,
        client_id=client,
        phase="train",
        round=number,
        input_digest=f"input-{number}",
        event=what or event(),
        **more,
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    with Ledger.open(path) as opened:
        yield opened


def spent(ledger, unit="example", data=DATA, **more):
    return ledger.spent(data_digest=data, unit=unit, delta=DELTA, **more)


def cost(*events):
    return epsilon(events, DELTA)


@pytest.fixture
def calls(monkeypatch):
    counted = []

    def counting(events, delta, **more):
        counted.append(events)
        return epsilon(events, delta, **more)

    monkeypatch.setattr(ledger_cost, "epsilon", counting)
    return counted


# --- recording


def test_a_charge_comes_back_as_it_was(ledger, path):
    given = charge(3, what=event(0.1 + 0.2, 1 / 3, 7), project="hospital")
    assert ledger.head() == "0" * 64
    assert ledger.charge(given)
    (entry,) = ledger.entries()
    assert entry.charge == given and entry.sequence == 1 and entry.time.endswith("+00:00")
    assert ledger.head() == entry.hash and entry.previous_hash == "0" * 64
    with Ledger.open(path, create=False) as again:
        assert again.entries() == [entry]
    assert ledger.entries(run_id="other") == [] == ledger.entries(data_digest="other")
    assert ledger.verify() == []
    assert path.stat().st_mode & 0o077 == 0


def test_the_same_charge_is_free_and_another_under_its_key_is_refused(ledger, path):
    assert ledger.charge(charge())
    assert not ledger.charge(charge())
    with Ledger.open(path) as again:
        assert not again.charge(charge())
    with pytest.raises(LedgerError, match="one release has one event"):
        ledger.charge(charge(what=event(steps=11)))
    assert ledger.charge(replace(charge(), input_digest="another input"))
    assert len(ledger.entries()) == 2
    assert ledger.events_of("r") == {"a": (event(steps=20),)}


def test_charges_out_of_range_are_refused(ledger):
    with pytest.raises(ConfigError, match="sampling probability"):
        ledger.charge(charge(what=event(q=2.0)))
    with pytest.raises(ConfigError):
        ledger.set_cap(data_digest=DATA, unit="example", epsilon=0.0, delta=DELTA)
    with pytest.raises(ConfigError):
        ledger.set_cap(data_digest=DATA, unit="example", epsilon=1.0, delta=1.0)
    with pytest.raises(ConfigError):
        ledger.set_cap(data_digest=DATA, unit="user", epsilon=1.0, delta=DELTA)
    assert ledger.entries() == []


# --- what it costs


def test_the_worst_client_counts_within_a_run_and_runs_add_up(ledger):
    for number in range(3):
        ledger.charge(charge(number))
    ledger.charge(charge(client="b", what=event(0.1)))
    assert spent(ledger) == max(cost(event(steps=30)), cost(event(0.1)))
    ledger.charge(charge(run="second", what=event(steps=170)))
    assert spent(ledger) == cost(event(steps=200)) > cost(event(0.1))
    ledger.charge(charge(run="elsewhere", data="e" * 64))
    assert spent(ledger) == cost(event(steps=200))
    assert spent(ledger, data="unknown") == 0
    assert spent(ledger, accountant="rdp") >= spent(ledger)


def test_another_partition_composes_with_the_worst_of_each(ledger):
    ledger.charge(charge(what=event(0.05, steps=10)))
    ledger.charge(charge(client="b", what=event(0.02, steps=40)))
    ledger.charge(charge(run="second", partition="p2", client="b", what=event(0.05, 2.0, 10)))
    worst_pair = max(
        cost(event(0.05, steps=10), event(0.05, 2.0, 10)), cost(event(0.02, steps=40), event(0.05, 2.0, 10))
    )
    bound = cost(event(0.05, steps=10), event(0.02, steps=30), event(0.05, 2.0, 10))
    assert worst_pair < spent(ledger) == pytest.approx(bound, rel=1e-3)


def test_client_level_events_count_as_replacements_for_an_example(ledger):
    ledger.charge(charge(what=event(unit="client")))
    assert spent(ledger, "client") == cost(event(unit="client"))
    replaced = cost(event(relation="replace_one"))
    assert spent(ledger, "example") == replaced > spent(ledger, "client")
    ledger.charge(charge(1))
    assert spent(ledger, "example") == cost(event(relation="replace_one", steps=20))
    assert spent(ledger, "client") == math.inf


def test_units_that_have_no_bound(ledger):
    ledger.charge(charge())
    assert spent(ledger, "client") == math.inf
    ledger.charge(charge(1, data="e", what=event(unit="client")))
    ledger.charge(charge(2, data="e", what=event(unit="client"), partition="p2", run="s"))
    assert spent(ledger, "client", data="e") == math.inf
    assert spent(ledger, "example", data="e") < math.inf
    ledger.charge(charge(3, data="f", what=event(sigma=0.0)))
    assert spent(ledger, data="f") == math.inf


def test_mixed_relations_count_as_replacement(ledger):
    ledger.charge(charge())
    ledger.charge(charge(1, what=event(relation="replace_one")))
    assert spent(ledger) == cost(event(relation="replace_one", steps=20))


def test_many_different_clients_are_bounded_quickly(ledger):
    plan = {f"c{i}": [event(0.001 + i / 1000, 1.0, 120 - i)] for i in range(60)}
    partitions = {"p": plan}
    began = time.perf_counter()
    value = ledger_cost.cost(partitions, unit="example", delta=DELTA)
    assert time.perf_counter() - began < 5
    assert value >= max(cost(*events) for events in itertools.islice(plan.values(), 0, None, 10)) * 0.998


# --- caps


def test_a_charge_past_the_cap_is_refused_and_not_recorded(ledger):
    ledger.set_cap(data_digest=DATA, unit="example", epsilon=2.0, delta=DELTA)
    assert ledger.cap(DATA, "example") == Cap(data_digest=DATA, unit="example", epsilon=2.0, delta=DELTA)
    assert ledger.cap(DATA, "client") is None
    with pytest.raises(BudgetExceededError) as caught:
        for number in range(1000):
            ledger.charge(charge(number))
    assert caught.value.exit_code == 3
    for part in ("client 'a'", "the cap is 2,", "is spent", "is left", "delta 1e-05 per example"):
        assert part in str(caught.value)
    count = len(ledger.entries())
    assert 0 < count < 1000
    assert cost(event(steps=10 * count)) <= 2.0 < cost(event(steps=10 * (count + 1)))
    assert not ledger.charge(charge(0))  # what was released stays released
    assert ledger.charge(charge(0, run="r2", data="e" * 64))  # another data set has its own budget
    assert ledger.verify() == []


def test_caps_are_in_the_chain_and_may_be_changed(ledger, path):
    ledger.set_cap(data_digest=DATA, unit="example", epsilon=0.01, delta=DELTA)
    head = ledger.head()
    ledger.set_cap(data_digest=DATA, unit="example", epsilon=0.01, delta=DELTA)
    assert ledger.head() == head
    with pytest.raises(BudgetExceededError):
        ledger.charge(charge())
    with Ledger.open(path) as other:
        other.set_cap(data_digest=DATA, unit="example", epsilon=50, delta=DELTA)
    assert ledger.charge(charge())
    with Ledger.open(path) as again:
        assert again.cap(DATA, "example").epsilon == 50.0
    assert ledger.verify() == []


def test_a_client_cap_refuses_example_level_events_with_the_reason(ledger):
    ledger.set_cap(data_digest=DATA, unit="client", epsilon=100.0, delta=DELTA)
    with pytest.raises(BudgetExceededError, match="do not bound what a whole client's data reveals"):
        ledger.charge(charge())


# --- plans


def approve(ledger, plan, run="r", **more):
    ledger.approve(plan, run_id=run, data_digest=DATA, partition_digest="p", **more)


def test_charges_within_an_approved_plan_need_no_accountant(ledger, calls):
    ledger.set_cap(data_digest=DATA, unit="example", epsilon=6.0, delta=DELTA)
    approve(ledger, {"a": [event(steps=50)], "b": [event(steps=50)]})
    checks = len(calls)
    assert checks == 1  # alike clients are one list
    for number in range(5):
        assert ledger.charge(charge(number)) and ledger.charge(charge(number, client="b"))
    assert len(calls) == checks
    ledger.charge(charge(5))  # one more than planned
    assert len(calls) == checks + 1
    ledger.charge(charge(0, client="stranger"))
    ledger.charge(charge(6, what=event(0.06)))
    assert len(calls) > checks + 2
    assert ledger.verify() == []


def test_a_plan_past_the_cap_is_refused_before_the_run(ledger):
    ledger.set_cap(data_digest=DATA, unit="example", epsilon=2.0, delta=DELTA)
    with pytest.raises(BudgetExceededError, match="plan of run 'r'"):
        approve(ledger, {"a": [event(steps=10_000)]})
    assert ledger.charge(charge())
    with pytest.raises(ConfigError):
        approve(ledger, {"a": [event(q=0.0)]})


def test_a_charge_outside_of_the_plan_cannot_pass_the_cap(ledger):
    limit = cost(event(steps=100))
    ledger.set_cap(data_digest=DATA, unit="example", epsilon=limit, delta=DELTA)
    approve(ledger, {"a": [event(steps=100)]})
    with pytest.raises(BudgetExceededError):
        ledger.charge(charge(what=event(sigma=0.5, steps=100)))
    for number in range(10):
        assert ledger.charge(charge(number))
    with pytest.raises(BudgetExceededError):
        ledger.charge(charge(10))
    assert spent(ledger) == limit


def test_what_others_charge_takes_the_approval_back(ledger, path, calls):
    limit = cost(event(steps=100))
    ledger.set_cap(data_digest=DATA, unit="example", epsilon=limit, delta=DELTA)
    approve(ledger, {"a": [event(steps=100)]})
    ledger.charge(charge(0))
    with Ledger.open(path) as other:
        for number in range(5):
            other.charge(charge(number, run="other"))
    for number in range(1, 5):
        assert ledger.charge(charge(number))
    with pytest.raises(BudgetExceededError):
        for number in range(5, 10):
            ledger.charge(charge(number))
    assert spent(ledger) <= limit


def test_a_lower_cap_takes_the_approval_back(ledger):
    ledger.set_cap(data_digest=DATA, unit="example", epsilon=9.0, delta=DELTA)
    approve(ledger, {"a": [event(steps=100)]})
    ledger.charge(charge(0))
    ledger.set_cap(data_digest=DATA, unit="example", epsilon=0.1, delta=DELTA)
    with pytest.raises(BudgetExceededError):
        ledger.charge(charge(1))


def test_a_resumed_run_approves_its_whole_plan_again(ledger, path):
    limit = cost(event(steps=100))
    ledger.set_cap(data_digest=DATA, unit="example", epsilon=limit, delta=DELTA)
    approve(ledger, {"a": [event(steps=100)]})
    for number in range(6):
        ledger.charge(charge(number))
    with Ledger.open(path) as resumed:
        approve(resumed, {"a": [event(steps=100)]})
        assert [resumed.charge(charge(number)) for number in range(10)] == [False] * 6 + [True] * 4
        with pytest.raises(BudgetExceededError):
            approve(resumed, {"a": [event(steps=10)]}, run="next")


def test_plans_of_several_runs_are_checked_together(ledger):
    limit = cost(event(steps=100))
    ledger.set_cap(data_digest=DATA, unit="example", epsilon=limit, delta=DELTA)
    approve(ledger, {"a": [event(steps=60)]})
    with pytest.raises(BudgetExceededError):
        approve(ledger, {"a": [event(steps=60)]}, run="second")
    ledger.erase_run_key("r")  # the first run ends early: its plan is free again
    approve(ledger, {"a": [event(steps=60)]}, run="second")


# --- tampering


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "ledger.sqlite"
    with Ledger.open(path) as opened:
        opened.set_cap(data_digest=DATA, unit="example", epsilon=20.0, delta=DELTA)
        for number in range(4):
            opened.charge(charge(number))
        assert opened.verify() == []
    return path


@pytest.fixture
def filled(path, sound):
    return Path(shutil.copy(sound, path))


def tamper(path, *statements, keep_triggers=False):
    with sqlite3.connect(path) as database:
        triggers = database.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        if not keep_triggers:
            for name, _ in triggers:
                database.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            database.execute(statement)
        if not keep_triggers:
            for _, sql in triggers:  # a careful hand puts them back
                database.execute(sql)
    database.close()


def problems(path):
    with Ledger.open(path) as opened:
        return opened.verify()


@pytest.mark.parametrize("sequence", [1, 4])
@pytest.mark.parametrize("column", [*COLUMNS, "previous_hash", "hash"])
def test_every_changed_field_is_found(filled, column, sequence):
    change = f"{column} || 'x'" if COLUMNS.get(column, str) is str else f"{column} + 1"
    tamper(filled, f"UPDATE chain SET {column} = {change} WHERE sequence = {sequence}")
    assert any(f"Row {sequence}" in problem for problem in problems(filled))


@pytest.mark.parametrize(
    "statements",
    [
        ["DELETE FROM chain WHERE sequence = 5"],
        ["DELETE FROM chain WHERE sequence = 2"],
        ["DELETE FROM chain"],
        [
            "DELETE FROM chain WHERE sequence = 3",
            "UPDATE chain SET sequence = sequence - 1 WHERE sequence > 3",
        ],
        [
            "UPDATE chain SET sequence = 99 WHERE sequence = 3",
            "UPDATE chain SET sequence = 3 WHERE sequence = 4",
            "UPDATE chain SET sequence = 4 WHERE sequence = 99",
        ],
        ["UPDATE chain SET sequence = 0 WHERE sequence = 1"],
        ["UPDATE head SET count = 4"],
        ["UPDATE head SET hash = 'x'"],
        ["DELETE FROM head"],
        ["DROP TABLE chain"],
    ],
    ids=str,
)
def test_missing_and_moved_rows_are_found_and_stop_the_ledger(filled, statements):
    with sqlite3.connect(filled) as database:
        if statements == ["DROP TABLE chain"]:
            database.execute("DROP TABLE chain")
    database.close()
    if statements != ["DROP TABLE chain"]:
        tamper(filled, *statements)
    assert problems(filled)
    with Ledger.open(filled) as opened, pytest.raises(LedgerError):
        opened.charge(charge(9))


def test_dropped_triggers_are_found(filled):
    with sqlite3.connect(filled) as database:
        database.execute("DROP TRIGGER chain_no_update")
    database.close()
    assert any("chain_no_update" in problem for problem in problems(filled))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE chain SET steps = 1",
        "DELETE FROM chain",
        "DELETE FROM head",
        "UPDATE head SET count = 0",
    ],
)
def test_sqlite_itself_refuses_changes(filled, statement):
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        tamper(filled, statement, keep_triggers=True)
    assert problems(filled) == []


def test_garbage_in_the_file_is_found(filled):
    with sqlite3.connect(filled) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    content = bytearray(filled.read_bytes())
    content[5000:9000] = b"\xff" * 4000
    filled.write_bytes(content)
    with contextlib.suppress(LedgerError):  # it need not even open
        assert problems(filled)


# --- files and keys


def test_files_that_are_no_ledger(tmp_path):
    with pytest.raises(LedgerError, match="no ledger at"):
        Ledger.open(tmp_path / "missing", create=False)
    (tmp_path / "text").write_text("not a database at all, and long enough to be looked at" * 100)
    with pytest.raises(LedgerError, match="not a privacy ledger"):
        Ledger.open(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other") as database:
        database.execute("CREATE TABLE notes (text)")
    database.close()
    before = (tmp_path / "other").read_bytes()
    with pytest.raises(LedgerError, match="not a privacy ledger"):
        Ledger.open(tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == before
    with pytest.raises(LedgerError):
        Ledger.open(tmp_path)
    with pytest.raises(LedgerError, match="cannot be created"):
        Ledger.open(tmp_path / "no" / "folder")


def test_a_newer_format_is_refused(filled):
    with sqlite3.connect(filled) as database:
        database.execute("PRAGMA user_version = 2")
    database.close()
    with pytest.raises(LedgerError, match="format 2"):
        Ledger.open(filled)


def test_run_keys_last_until_erased_and_leave_no_bytes(ledger, path):
    key = ledger.run_key("r")
    assert len(key) == 32 and ledger.run_key("r") == key != ledger.run_key("s")
    with Ledger.open(path) as again:
        assert again.run_key("r") == key

    def on_disk():
        return any(key in file.read_bytes() for file in path.parent.iterdir())

    assert on_disk()
    ledger.erase_run_key("r")
    assert not on_disk()
    with pytest.raises(LedgerError, match="erased"):
        ledger.run_key("r")
    ledger.erase_run_key("r")
    ledger.erase_run_key("never")
    with pytest.raises(LedgerError):
        ledger.run_key("never")
    assert ledger.verify() == [] and len(ledger.run_key("s")) == 32


# --- processes

CHARGER = """
import sys
from privfed.privacy.ledger import Charge, Ledger
from privfed.types import PrivacyEvent
path, run, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
event = PrivacyEvent(unit="example", noise_multiplier=1.0, sampling_probability=0.05, steps=1)
with Ledger.open(path) as ledger:
    for number in range(count):
        ledger.charge(Charge(run_id=run, data_digest="d", partition_digest="p", client_id="a", phase="train",
                             round=number, input_digest="i", event=event))
        print(number, flush=True)
"""


def charger(path, run, count):
    arguments = [sys.executable, "-c", CHARGER, str(path), run, str(count)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def test_processes_share_a_ledger(path):
    processes = [charger(path, run, 40) for run in ("one", "two", "three")]
    assert [process.communicate(timeout=60)[0].count("\n") for process in processes] == [40] * 3
    with Ledger.open(path) as ledger:
        assert ledger.verify() == []
        assert [entry.sequence for entry in ledger.entries()] == list(range(1, 121))
        assert all(len(ledger.entries(run_id=run)) == 40 for run in ("one", "two", "three"))


def test_two_open_ledgers_cannot_pass_the_cap_together(path):
    with Ledger.open(path) as one, Ledger.open(path) as two:
        one.set_cap(data_digest=DATA, unit="example", epsilon=cost(event(steps=40)), delta=DELTA)
        accepted = 0
        with pytest.raises(BudgetExceededError):
            for number in range(10):
                for ledger in (one, two):
                    ledger.charge(charge(number, run=str(id(ledger))))
                    accepted += 1
        assert accepted == 4


def test_what_was_acknowledged_survives_a_kill(path):
    rng = random.Random(7)
    acknowledged = set()
    for attempt in range(5):
        process = charger(path, f"run{attempt}", 100_000)
        lines = [process.stdout.readline() for _ in range(rng.randint(1, 30))]
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        lines += process.communicate(timeout=30)[0].splitlines(keepends=True)
        acknowledged |= {(f"run{attempt}", int(line)) for line in lines if line.endswith("\n")}
    with Ledger.open(path) as ledger:
        assert ledger.verify() == []
        found = {(entry.charge.run_id, entry.charge.round) for entry in ledger.entries()}
        assert acknowledged <= found
        assert len(found) <= len(acknowledged) + 5  # at most the one that was under way, per kill
        assert ledger.charge(charge(data="d"))


def test_a_charge_takes_milliseconds(ledger):
    ledger.set_cap(data_digest=DATA, unit="example", epsilon=10.0, delta=DELTA)
    approve(ledger, {"a": [event(steps=2000, q=0.01)]})
    took = []
    for number in range(100):
        began = time.perf_counter()
        ledger.charge(charge(number, what=event(q=0.01)))
        took.append(time.perf_counter() - began)
    assert sorted(took)[10] < 0.05  # a fast disk needs a tenth of that; a busy machine may need more
