"""Every error that privfed raises on purpose.

The tree, with the exit code of the command line in brackets::

    PrivfedError [1]
    |-- ConfigError [2]            a value in the configuration or on the command line
    |   |-- UnknownNameError [2]   a key, preset, plug-in or data set that does not exist
    |   `-- ResumeError [2]        the run folder does not fit the configuration
    |-- DataError [2]              the data set cannot be used as described
    |-- ModelError [2]             the model cannot be loaded or tuned as described
    |-- BudgetExceededError [3]    a charge would pass the data holder's cap
    |-- LedgerError [1]            the ledger is damaged, locked or was tampered with
    |-- SentinelError [1]          a self-check of the training failed: nothing more is released
    |-- ClientError [1]            one client failed; costs a round only that client
    |   `-- DeadlineError [1]      ... because it took longer than its deadline
    |-- RoundError [1]             too few clients survived a round
    `-- SecAggError [1]            secure aggregation refused or failed
        |-- ProtocolError [1]      a message out of order, repeated, malformed or not authentic
        |   |-- MessageError [1]       ... malformed, oversized, damaged, or of another round
        |   |-- StageError [1]         ... out of order or repeated
        |   |-- AuthenticityError [1]  ... not from the client it names: a key was swapped, or a byte altered
        |   |-- EquivocationError [1]  ... the server told different clients different things
        |   `-- ShareError [1]         ... shares that do not give the secret that was advertised
        `-- ThresholdError [1]     fewer survivors than the threshold

Messages are one sentence that says what was given, what was expected and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PrivfedError(Exception):
    """Base of every error raised on purpose; ``exit_code`` is the command line's."""

    exit_code = 1


class ConfigError(PrivfedError):
    """A value in the configuration or on the command line cannot hold."""

    exit_code = 2


class UnknownNameError(ConfigError):
    """A key, preset, plug-in or data set that does not exist."""


class ResumeError(ConfigError):
    """The run folder does not fit the configuration that was asked for."""


class DataError(PrivfedError):
    """The data set cannot be used as described."""

    exit_code = 2


class ModelError(PrivfedError):
    """The model cannot be loaded or tuned as described."""

    exit_code = 2


class BudgetExceededError(PrivfedError):
    """A charge would pass the data holder's cap; nothing was released."""

    exit_code = 3


class LedgerError(PrivfedError):
    """The ledger is damaged, locked by another process, or was tampered with."""


class SentinelError(PrivfedError):
    """A self-check of the training failed; nothing more is released."""


class ClientError(PrivfedError):
    """One client failed; the round goes on without it."""


class DeadlineError(ClientError):
    """A client took longer than its deadline."""


class RoundError(PrivfedError):
    """Too few clients survived a round for it to count."""


class SecAggError(PrivfedError):
    """Secure aggregation refused or failed."""


class ProtocolError(SecAggError):
    """A message out of order, repeated, malformed or not authentic."""


class MessageError(ProtocolError):
    """A message that is malformed, oversized, damaged on its way, or of another round or configuration."""


class StageError(ProtocolError):
    """A message or call out of order or for the second time."""


class AuthenticityError(ProtocolError):
    """A message, key or share that does not come from the client it names."""


class EquivocationError(ProtocolError):
    """The server told different clients different things, or left this client out; nothing was revealed."""


class ShareError(ProtocolError):
    """Shares that do not give the secret that their owner advertised.

    Attributes:
        peer: The owner of the secret. It dealt, or another client returned, a wrong share.
    """

    def __init__(self, message: str, peer: str) -> None:
        super().__init__(message)
        self.peer = peer


class ThresholdError(SecAggError):
    """Fewer survivors than the threshold; the sum cannot and must not be unmasked."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a suggestion such as ``" Did you mean 'lora'?"``, or ``""`` where nothing is near."""
    hits = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {hits[0]!r}?" if hits else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """Return the error for a ``name`` that is none of the ``known`` names of this ``kind``."""
    names = sorted(known)
    return UnknownNameError(f"Unknown {kind} {name!r}.{nearest(name, names)} Known: {', '.join(names)}.")
