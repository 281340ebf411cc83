"""What an operator watches: lines, Prometheus text, one JSON object a stage; and nothing private in any of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from privfed.config import RunConfig
from privfed.deployment.watch import GAUGES, JsonLog, Watch
from privfed.federation.engines.flower.engine import FlowerEngine
from privfed.federation.engines.flower.fleet import Deadlines
from privfed.federation.local import LocalTrainer
from privfed.run import train

from ..federation.engines.deployment import Lab, LabChannel

# the exposition format: https://prometheus.io/docs/instrumenting/exposition_formats
SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)\{phase="([a-z_]+)"\} (-?[0-9.]+(?:e[+-]?[0-9]+)?)')
STAGE_KEYS = {"time", "stage", "seconds", "busy", "bytes_up", "bytes_down", "asked", "answered", "missing"}
SITE_KEYS = {"time", "asked", "run_id", "status", "reason", "seconds", "errors"}


def _samples(text: str) -> dict[str, float]:
    """Return gauges by name; every line of the text has to be one that Prometheus reads."""
    found: dict[str, float] = {}
    described: set[str] = set()
    for line in text.splitlines():
        if line.startswith("# "):
            _, kind, name, *_ = line.split(" ")
            assert kind in ("HELP", "TYPE")
            assert name not in found  # what describes a metric comes before its samples
            described.add(f"{kind} {name}")
            continue
        match = SAMPLE.fullmatch(line)
        assert match is not None, line
        assert {f"HELP {match[1]}", f"TYPE {match[1]}"} <= described
        found[match[1]] = float(match[3])
    assert text.endswith("\n")
    return found


def test_the_gauges_say_what_the_last_round_says(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    record = {
        "kind": "round",
        "survivors": 3,
        "cohort": 4,
        "bytes_up": 5000,
        "bytes_down": 7000,
        "seconds": {"total": 1.5},
    }
    metrics.write_text("".join(json.dumps(r) + "\n" for r in ({"kind": "start", "planned_epsilon": 8.0}, record)))
    watch = Watch(tmp_path / "log", tmp_path / "prom", metrics)
    watch.round_started("train", 2, 5, 4)
    watch.evaluated("train", 2, "accuracy", 0.625)
    watch.round_done("train", 2, 5, 3.25)
    found = _samples((tmp_path / "prom").read_text())
    assert found == {
        "privfed_round": 2,
        "privfed_rounds": 5,
        "privfed_survivors": 3,
        "privfed_cohort": 4,
        "privfed_bytes_up": 5000,
        "privfed_bytes_down": 7000,
        "privfed_round_seconds": 1.5,
        "privfed_epsilon_spent": 3.25,
        "privfed_epsilon_left": 4.75,
        "privfed_score": 0.625,
    }
    assert set(found) == set(GAUGES)
    said = (tmp_path / "log").read_text()
    assert "train 2/5: 3 of 4 clients, 5 kB up, 7 kB down, epsilon 3.25 spent, 4.75 left, 1.5 s" in said


@pytest.mark.slow
def test_no_log_holds_a_value_of_a_client(
    tiny_config: Callable[..., RunConfig], text_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a record nor a value of an update is in what the parties log, even where a client fails over a record."""
    config = tiny_config(server={"cohort_size": 4})
    lab = Lab(config, 2, tmp_path / "sites")
    secret = "the record of one person"
    metrics = tmp_path / "run" / "metrics.jsonl"
    watch = Watch(tmp_path / "server.log", tmp_path / "metrics.prom", metrics)
    engine = FlowerEngine(
        sites=lab.sites,
        channel=LabChannel(lab),
        deadlines=Deadlines(stage=0.05),
        log=JsonLog(tmp_path / "stages.jsonl"),
    )
    real = LocalTrainer.run
    failed: list[object] = []

    def run(self: LocalTrainer, start: Any, shard: Any, *rest: Any) -> Any:
        if shard.client_id == "client-0" and not failed:
            failed.append(shard)
            raise ValueError(secret)
        return real(self, start, shard, *rest)

    monkeypatch.setattr(LocalTrainer, "run", run)
    try:
        train(config, out=tmp_path / "run", engine=engine, progress=watch)
    finally:
        lab.close()
    files = [tmp_path / "server.log", tmp_path / "stages.jsonl", tmp_path / "metrics.prom", metrics]
    files += [lab.folder / name / "site.jsonl" for name in lab.names]
    texts = {line.split(",")[0].strip('"') for line in text_csv.read_text().splitlines()[1:]}
    for file in files:
        content = file.read_text()
        assert content
        assert secret not in content
        assert not [text for text in texts if len(text) > 8 and text in content]
    for keys, file in ((STAGE_KEYS, files[1]), (SITE_KEYS, files[4]), (SITE_KEYS, files[5])):
        for line in map(json.loads, file.read_text().splitlines()):
            assert line.keys() <= keys
    _samples((tmp_path / "metrics.prom").read_text())
    assert "dropped client-0: ValueError\n" in (tmp_path / "server.log").read_text()
