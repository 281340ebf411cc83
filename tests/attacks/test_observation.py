"""What each vantage is handed, and what cannot be reached from it."""

from __future__ import annotations

import ast
import copy
import gc
import pickle
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.errors import ConfigError
from privfed_attacks.observation import Observation, Observations, SideInformation, ThreatModel
from privfed_attacks.sealed import Sealed, SealedError, unseal

PACKAGE = Path(__file__).parents[2] / "attacks" / "privfed_attacks"


@pytest.fixture(scope="module")
def transcripts(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, text_csv: Path) -> Callable[[str], Any]:
    """Return a function from a kind of secure aggregation to the transcript of a small recorded run."""
    from privfed.config import parse_config
    from privfed.federation.transcript import Transcript
    from privfed.run import train

    made: dict[str, Path] = {}

    def transcript(secagg: str) -> Any:
        if secagg not in made:
            folder = tmp_path_factory.mktemp("recorded")
            raw = {
                "model": {"name": str(tiny_bert), "max_length": 24},
                "data": {"path": str(text_csv), "client": "client"},
                "partition": {"name": "iid", "clients": 4},
                "tuning": {"name": "ffa_lora", "r": 2},
                "client": {"optimizer": "sgd", "learning_rate": 0.5, "batch_size": 4, "local_steps": 1},
                "server": {"rounds": 2, "cohort_size": 3, "evaluate_every": 2},
                "privacy": {"unit": "none"},
                "secagg": {"name": secagg},
                "audit": {"record": True},
                "ledger": {"path": str(folder / "ledger.sqlite")},
            }
            made[secagg] = train(parse_config(raw, where="test"), out=folder / "run").folder
        return Transcript(made[secagg])

    return transcript


def test_the_server_without_masking_sees_every_update(transcripts: Callable[[str], Any]) -> None:
    transcript = transcripts("none")
    seen = ThreatModel().view(transcript)
    assert len(seen) == 6
    assert [each.round for each in seen] == [1, 1, 1, 2, 2, 2]
    for each in seen:
        assert each.vantage == "individual"
        assert each.contributors == 1
        assert each.source is not None
        assert set(each.payload) == set(each.layout.names) <= set(each.params)
        assert each.side.client is not None
        assert each.side.client.learning_rate == 0.5
    name = seen[0].source
    assert name is not None
    only = ThreatModel(clients=frozenset({name})).view(transcript)
    assert {each.source for each in only} == {name}


def test_the_average_is_of_the_same_updates(transcripts: Callable[[str], Any]) -> None:
    transcript = transcripts("none")
    single = ThreatModel().view(transcript)
    together = ThreatModel(observes="aggregate").view(transcript)
    assert [each.contributors for each in together] == [3, 3]
    for each in together:
        own = [one.flat() for one in single if one.round == each.round]
        np.testing.assert_allclose(np.mean(own, axis=0), each.flat(), rtol=1e-4, atol=1e-8)


def test_releases(transcripts: Callable[[str], Any]) -> None:
    transcript = transcripts("none")
    iterates = ThreatModel(role="client", observes="release").view(transcript)
    last = ThreatModel(role="outsider", observes="release").view(transcript)
    assert [each.round for each in iterates] == [1, 2]
    assert [each.round for each in last] == [2]
    np.testing.assert_allclose(sum(each.flat() for each in iterates), last[0].flat(), rtol=1e-4, atol=1e-7)


def test_a_masked_run_has_no_single_updates(transcripts: Callable[[str], Any]) -> None:
    transcript = transcripts("masked")
    with pytest.raises(ConfigError, match="This run was masked"):
        ThreatModel().view(transcript)
    assert len(ThreatModel(observes="aggregate").view(transcript)) == 2


@pytest.mark.parametrize(
    ("role", "observes"), [("server", "aggregate"), ("client", "release"), ("outsider", "release")]
)
def test_no_client_can_be_reached_from_an_aggregate_view(
    transcripts: Callable[[str], Any], role: Any, observes: Any
) -> None:
    """The run is not masked, so its transcript *has* single updates: the view must have let go of them."""
    transcript = transcripts("none")
    hidden = [each.flat() for each in ThreatModel().view(transcript)]
    messages = [message for record in transcript.rounds() for message in record.messages]
    seen = ThreatModel(role=role, observes=observes).view(transcript)
    assert not _leaks(seen, hidden, messages)


def test_the_walk_finds_what_is_there(transcripts: Callable[[str], Any]) -> None:
    transcript = transcripts("none")
    seen = ThreatModel().view(transcript)
    hidden = [each.flat() for each in seen]
    messages = [message for record in transcript.rounds() for message in record.messages]
    assert _leaks(seen, hidden, messages)
    record = next(transcript.rounds())
    aggregate = ThreatModel(observes="aggregate").view(transcript)
    for way in (
        lambda: record,
        [lambda n=record: n],
        {"deep": (record,)},
        np.frombuffer(record.messages[0], dtype=np.uint8)[5:9],
    ):
        assert _leaks((aggregate, way), hidden, messages)


def _leaks(start: object, hidden: list[Any], messages: list[bytes]) -> bool:
    """Return whether a client's update, or a message or a part of one, can be reached from ``start``."""
    firsts = [each[np.flatnonzero(each)[:8]].tobytes() for each in hidden]
    for found in _reachable(start):
        if isinstance(found, np.ndarray):
            values = found.ravel()
            if values.dtype == np.float32 and values[np.flatnonzero(values)[:8]].tobytes() in firsts:
                return True
        elif isinstance(found, bytes | bytearray) and any(bytes(found) == message for message in messages):
            return True
    return False


def _reachable(start: object) -> Iterator[object]:
    """Yield everything that references lead to: attributes, containers, closures, defaults, the memory of views.

    Modules and classes are where the walk ends: what they hold is the program, the same for everybody.
    """
    seen, todo = set(), [start]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, types.ModuleType | type):
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, types.FunctionType):
            todo += [cell.cell_contents for cell in one.__closure__ or ()]
            todo += [*(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values()]
            continue
        if isinstance(one, np.ndarray | memoryview):
            base = one.base if isinstance(one, np.ndarray) else one.obj
            todo.append(base)
        todo += gc.get_referents(one)


def test_what_was_seen_cannot_be_changed(transcripts: Callable[[str], Any]) -> None:
    each = ThreatModel(observes="aggregate").view(transcripts("none"))[0]
    name = each.layout.names[0]
    with pytest.raises(ValueError, match="read-only"):
        each.payload[name][:] = 0
    with pytest.raises(TypeError):
        each.payload[name] = np.zeros(3)  # type: ignore[index]
    with pytest.raises(AttributeError):
        each.round = 5  # type: ignore[misc]


def test_what_the_adversary_does_not_know_is_not_told(transcripts: Callable[[str], Any]) -> None:
    seen = ThreatModel(knows=frozenset({"model"})).view(transcripts("none"))
    assert seen[0].side.model is not None
    assert seen[0].side.tuning is None
    assert seen[0].side.client is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"role": "client", "observes": "aggregate"}, "only the server sees updates"),
        ({"role": "outsider", "observes": "individual"}, "only the server sees updates"),
        ({"role": "client", "observes": "release", "can_modify": frozenset({"broadcast"})}, "Only a server can"),
        ({"can_modify": frozenset({"own_data"})}, "Only a client can"),
    ],
)
def test_adversaries_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ThreatModel(**given)


def test_a_payload_has_to_fit_its_layout(transcripts: Callable[[str], Any]) -> None:
    each = ThreatModel(observes="aggregate").view(transcripts("none"))[0]
    fields = {name: getattr(each, name) for name in Observation.__slots__}
    with pytest.raises(ConfigError, match="does not have the tensors"):
        Observation(**{**fields, "payload": {"other": np.zeros(3, dtype=np.float32)}})


def test_the_public_model_is_set_to_what_was_broadcast(transcripts: Callable[[str], Any]) -> None:
    from privfed_attacks.public_model import rebuild

    seen = ThreatModel(observes="aggregate").view(transcripts("none"))
    model = rebuild(seen[1].side)
    module = model.at(seen[1])
    own = dict(module.named_parameters())
    assert {name for name, p in own.items() if p.requires_grad} == set(seen[1].layout.names)
    for name, value in seen[1].params.items():
        np.testing.assert_array_equal(own[name].detach().numpy(), value)
    with pytest.raises(ConfigError, match="knows neither model nor tuning"):
        rebuild(SideInformation(model=None, tuning=None, init_seed=0, client=None))


def test_a_sealed_value_opens_for_scorers_only() -> None:
    truth = "the secret text"
    sealed = Sealed(truth)
    assert unseal(sealed) == truth
    assert truth not in repr(sealed) + str(sealed)
    assert all(found != truth for found in _reachable(sealed))
    assert sealed == sealed and sealed != Sealed(truth)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(SealedError):
            copied(sealed)


def _imports(file: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of every import of a file, also those inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, file
            yield from ((node.module or "", alias.name) for alias in node.names)


def test_attacks_reach_a_run_through_observations_only() -> None:
    """No file but observation.py imports the federation, the runs or their folders; no file but a scorer unseals."""
    closed = ("privfed.federation", "privfed.run", "privfed.report", "privfed.cli", "privfed.data.load")
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) > 5
    for file in files:
        for module, name in _imports(file):
            full = f"{module}.{name}"
            if file.name != "observation.py":
                assert not any(full == each or full.startswith(f"{each}.") for each in closed), (file, full)
            if name == "unseal" or (module.endswith("sealed") and name in ("_HELD", "*")):
                assert file.name.startswith("scor"), (file, full)
        assert "importlib" not in file.read_text(encoding="utf-8"), file


def test_observations_are_a_sequence() -> None:
    empty = Observations(threat=ThreatModel(), seen=())
    assert len(empty) == 0
    assert list(empty) == []
    assert empty.of("train") == ()
    assert empty.sources() == {}
