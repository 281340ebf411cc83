"""What a run tells whoever watches it; the command line draws bars or lines from it."""

from __future__ import annotations


class Progress:
    """Callbacks of a run, called in order from one thread. These do nothing: override those that matter."""

    def message(self, text: str) -> None:
        """Say one line."""

    def round_started(self, phase: str, number: int, rounds: int, cohort: int) -> None:
        """A round begins."""

    def step_done(self, client_id: str, step: int, steps: int) -> None:
        """A client took a step."""

    def client_done(self, client_id: str) -> None:
        """A client is through, or dropped."""

    def client_dropped(self, client_id: str, reason: str) -> None:
        """A client failed."""

    def round_done(self, phase: str, number: int, rounds: int, epsilon: float | None) -> None:
        """A round is complete; ``epsilon`` is what is spent so far, or None without a guarantee."""

    def evaluated(self, phase: str, number: int, metric: str, value: float) -> None:
        """The model was scored on the test split."""


class Silent(Progress):
    """A progress that says nothing."""
