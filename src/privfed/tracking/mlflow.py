"""MLflow: one MLflow run for each run, on a tracking server or in a folder."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from privfed.table import Table
from privfed.tracking import TRACKERS, TrackedRun, TrackerPlugin

TAG = "privfed.run_id"
# an MLflow server takes so many parameters in one request, each so long
MOST_PARAMETERS = 100
LONGEST = 500


class MlflowConfig(Table):
    """Options.

    Attributes:
        uri: The tracking server's address, or a store on this machine such as ``sqlite:///mlflow.db``. Unset: what
            ``MLFLOW_TRACKING_URI`` says, or MLflow's own default.
        experiment: The experiment that runs are filed under; made if it is not there.
    """

    name: Literal["mlflow"] = "mlflow"
    uri: str | None = Field(default=None, min_length=1)
    experiment: str = Field(default="privfed", min_length=1)


class Mlflow:
    """Logs metrics of one MLflow run; steps that are there already are left as they are."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self._run_id = run_id
        self._last: dict[str, int] = {}

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send figures of one step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        fresh = [Metric(key, value, now, step) for key, value in values.items() if step > self._known(key)]
        if fresh:
            self._client.log_batch(self._run_id, metrics=fresh)

    def close(self, *, finished: bool) -> None:
        """Say how the run ended; one that was stopped goes on when it is resumed."""
        self._client.set_terminated(self._run_id, status="FINISHED" if finished else "KILLED")

    def _known(self, key: str) -> int:
        if key not in self._last:
            history = self._client.get_metric_history(self._run_id, key)
            self._last[key] = max((metric.step for metric in history), default=-1)
        return self._last[key]


def start(config: MlflowConfig, run: TrackedRun) -> Mlflow:
    """Return the MLflow run of this run: the one that it had before it was resumed, or a new one."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before the import
    from mlflow import MlflowClient
    from mlflow.entities import Param

    client = MlflowClient(tracking_uri=config.uri)
    known = client.get_experiment_by_name(config.experiment)
    experiment = known.experiment_id if known is not None else client.create_experiment(config.experiment)
    found = client.search_runs([experiment], filter_string=f"tags.`{TAG}` = '{run.run_id}'", max_results=1)
    if found:
        client.update_run(found[0].info.run_id, status="RUNNING")
        return Mlflow(client, found[0].info.run_id)
    made = client.create_run(experiment, tags={TAG: run.run_id}, run_name=run.folder.resolve().name)
    params = [Param(key, str(value)[:LONGEST]) for key, value in run.config.items()]
    for first in range(0, len(params), MOST_PARAMETERS):
        client.log_batch(made.info.run_id, params=params[first : first + MOST_PARAMETERS])
    return Mlflow(client, made.info.run_id)


def failures() -> tuple[type[Exception], ...]:
    """Return how MLflow fails: its own exception, or the network's."""
    from mlflow.exceptions import MlflowException

    return MlflowException, OSError


TRACKERS.register("mlflow")(TrackerPlugin(config=MlflowConfig, build=start, package="mlflow", failures=failures))
