"""Secure aggregation: the server learns the sum of the clients' vectors and no single vector.

The staged protocol of Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning"
(CCS 2017), on the complete graph of clients. `ClientSession` and `ServerSession` are state machines that take
and return bytes and do no I/O; whoever drives them carries the bytes, over channels that should be encrypted.

Limits of this first form:

- Public keys are not signed. A server that follows the protocol and only looks (honest but curious) learns
  the sum, even together with fewer than ``threshold`` clients. A server that lies can advertise keys of its
  own in the place of every other client's and read a vector; only signed identities prevent that.
- Messages are not signed either. A change to any one message makes its receiver or a later stage refuse (a
  masked vector is checked by a tag under its sender's seed, which the server has only at the end, so a vector
  altered on purpose costs the round; an accident is found on receipt, by a checksum, and costs one client).
  Whoever alters several messages consistently can do all that a lying server can.
- A client can stop a round by sending bad shares, and can put anything into its own vector: a mask cannot
  bound a norm. The error of a wrong share names whose secret is affected, not who lied.

`privfed.secagg.session` states what ``threshold`` gives against clients that collude or a server that
equivocates.
"""

from __future__ import annotations

from privfed.secagg.client import ClientSession
from privfed.secagg.server import ServerSession
from privfed.secagg.session import SessionParams, default_threshold

__all__ = ["ClientSession", "ServerSession", "SessionParams", "default_threshold"]
