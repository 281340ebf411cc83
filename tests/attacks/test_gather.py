"""Membership attacks on a recorded run, from what each adversary saw of it."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from privfed.errors import ConfigError
from privfed.models.examples import TextExamples
from privfed_attacks.gather import from_release, from_updates, query_gradients
from privfed_attacks.membership import MEMBERSHIP
from privfed_attacks.observation import ThreatModel
from privfed_attacks.public_model import rebuild
from privfed_attacks.roc import roc


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, tiny_bert, text_csv):
    """Return (transcript, texts by client, labels by client) of a small run without privacy, on random labels."""
    from privfed.config import parse_config
    from privfed.federation.transcript import Transcript
    from privfed.run import train

    folder = tmp_path_factory.mktemp("recorded")
    with text_csv.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kept = folder / "half.csv"
    members = [row for number, row in enumerate(rows) if number % 2 == 0]
    with kept.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=["text", "label", "client"])
        writer.writeheader()
        writer.writerows(members)
    raw = {
        "seed": 3,
        "model": {"name": str(tiny_bert), "max_length": 24},
        "data": {"path": str(kept), "client": "client", "test_fraction": 0.1},
        "partition": {"name": "by_column"},
        "tuning": {"name": "ffa_lora", "r": 8},
        "client": {"optimizer": "sgd", "learning_rate": 0.5, "batch_size": 16, "local_steps": 1},
        "server": {"rounds": 4, "cohort_size": 6, "evaluate_every": 4},
        "privacy": {"unit": "none"},
        "head_warm_start": {"name": "none"},
        "secagg": {"name": "none"},
        "audit": {"record": True},
        "ledger": {"path": str(folder / "ledger.sqlite")},
    }
    found = train(parse_config(raw, where="test"), out=folder / "run").folder
    outside = [row for number, row in enumerate(rows) if number % 2 == 1]
    return Transcript(found), members, outside


def asked(public, members, outside, client, count=20):
    """Return (queries, bits): rows of one client, half of them trained on."""
    inside = [row for row in members if row["client"] == client][:count]
    rest = outside[: len(inside)]
    rows = [*inside, *rest]
    names = {"animals": 0, "music": 1, "weather": 2}
    labels = np.array([names[row["label"]] for row in rows], dtype=np.int64)
    queries = TextExamples([row["text"] for row in rows], labels, public.tokenizer, 24)
    return queries, np.arange(len(rows)) < len(inside)


def test_attacks_on_updates_read_what_the_server_saw(recorded):
    transcript, members, outside = recorded
    seen = ThreatModel().view(transcript)
    public = rebuild(seen[0].side)
    areas = {"update_cosine": [], "gradient_dot": [], "fed_cosine": []}
    for client in sorted(seen.sources()):
        queries, bits = asked(public, members, outside, client)
        evidence = from_updates(seen.of("train"), public, queries, target=client)
        assert evidence.client_updates_RCD.shape[:2] == (4, 6)
        np.testing.assert_array_equal(evidence.client_updates_RCD[:, 0], evidence.updates_RD)
        for name, found in areas.items():
            found.append(roc(MEMBERSHIP.get(name).score(evidence), bits).auc)
    assert np.mean(areas["fed_cosine"]) > 0.7
    assert np.mean(areas["gradient_dot"]) > 0.6
    with pytest.raises(ConfigError, match="name the client"):
        from_updates(seen.of("train"), public, queries)
    with pytest.raises(ConfigError, match="no observation of 'nobody'"):
        from_updates(seen.of("train"), public, queries, target="nobody")


def test_an_average_has_no_single_clients(recorded):
    transcript, members, outside = recorded
    seen = ThreatModel(observes="aggregate").view(transcript)
    public = rebuild(seen[0].side)
    queries, _ = asked(public, members, outside, "owner0")
    evidence = from_updates(seen.of("train"), public, queries)
    assert evidence.client_updates_RCD is None
    with pytest.raises(ConfigError, match="'fed_cosine' needs client_updates_RCD"):
        MEMBERSHIP.get("fed_cosine").score(evidence)
    assert MEMBERSHIP.get("gradient_dot").score(evidence).shape == (len(queries),)


def test_losses_are_those_of_the_released_model(recorded):
    transcript, members, outside = recorded
    (last,) = ThreatModel(role="outsider", observes="release").view(transcript)
    public = rebuild(last.side)
    queries, _ = asked(public, members, outside, "owner1")
    found = from_release(last, public, queries, queries)
    np.testing.assert_array_equal(found.losses_Q, found.population_losses_Z)
    module = public.at(last)
    before = queries.losses(module, queries.batch(np.arange(len(queries)))).detach().numpy()
    assert not np.allclose(found.losses_Q, before, atol=1e-3)
    final = {name: last.params[name] + last.payload[name] for name in last.payload}
    own = dict(module.named_parameters())
    for name, value in final.items():
        own[name].data.copy_(own[name].data.new_tensor(value))
    after = queries.losses(module, queries.batch(np.arange(len(queries)))).detach().numpy()
    np.testing.assert_allclose(found.losses_Q, after, rtol=1e-4, atol=1e-5)


def test_gradients_are_autograds_in_the_order_that_was_seen(recorded):
    transcript, members, outside = recorded
    seen = ThreatModel().view(transcript)
    public = rebuild(seen[0].side)
    queries, _ = asked(public, members, outside, "owner0", count=2)
    module = public.at(seen[-1])
    names = seen[-1].layout.names[::-1]
    found = query_gradients(module, queries, names)
    own = dict(module.named_parameters())
    for row in range(len(queries)):
        for name in names:
            own[name].grad = None
        queries.losses(module, queries.batch(np.array([row]))).sum().backward()
        wanted = np.concatenate([own[name].grad.numpy().ravel() for name in names])
        np.testing.assert_allclose(found[row], wanted, rtol=1e-3, atol=1e-6)
    with pytest.raises(ConfigError, match="not trained"):
        query_gradients(module, queries, ["nothing"])
