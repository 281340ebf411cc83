"""Secure aggregation: the server learns the sum of the clients' vectors and no single vector.

The staged protocol of Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning"
(CCS 2017), with signed keys and a signed list of survivors, on the complete graph or the sparse one of Bell et al.
(CCS 2020). `ClientSession` and `ServerSession` are state machines that take and return bytes and do no I/O;
whoever drives them carries the bytes, over channels that should be encrypted.

What it gives is stated in `privfed.secagg.session`. What it does not:

- The roster of identities and the parameters have to reach each client by a way that the server cannot change.
- A client can stop a round by sending bad shares, and can put anything into its own vector: a mask cannot bound a
  norm, so a clip on the clients' side binds honest clients only. The error of a wrong share names whose secret is
  affected, not who lied.
- The server learns the sum, and who took part and who dropped.
"""

from __future__ import annotations

from privfed.secagg.client import ClientSession
from privfed.secagg.identity import Identity
from privfed.secagg.server import ServerSession
from privfed.secagg.session import Requirements, SessionParams

__all__ = ["ClientSession", "Identity", "Requirements", "ServerSession", "SessionParams"]
