"""The ClientApp: hands each message to the site and its reply back, and knows nothing else.

``app`` is what a SuperNode runs that Flower manages (``flwr run`` in a Flower deployment of one's own): it forwards to
the site's own process over the Unix socket that the node's configuration names as ``privfed-site``. ``answer`` is the
same without Flower's process, for `privfed join`. Neither imports torch.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from privfed.errors import ConfigError, MessageError
from privfed.federation.engines.flower.envelope import MOST_BYTES
from privfed.federation.engines.flower.records import from_records, to_records

SOCKET_KEY = "privfed-site"
_LENGTH = 8

app = ClientApp()


@app.train("privfed")  # type: ignore[untyped-decorator]
def forward(message: Message, context: Context) -> Message:
    """Carry one message to the site's process and its reply back.

    Raises:
        ConfigError: If the node's configuration does not say where the site is.
    """
    path = context.node_config.get(SOCKET_KEY)
    if not isinstance(path, str):
        raise ConfigError(f"Start the SuperNode with --node-config '{SOCKET_KEY}=\"/path/of/site.socket\"'.")
    return answer(message, lambda asked: ask_socket(Path(path), asked))


def answer(message: Message, handle: Callable[[bytes], bytes]) -> Message:
    """Return the Flower message that answers ``message`` with what ``handle`` makes of its bytes."""
    return Message(content=to_records(handle(from_records(message.content))), reply_to=message)


def ask_socket(path: Path, asked: bytes) -> bytes:
    """Return the reply of the site that listens at a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(path))
        send(connection, asked)
        return receive(connection)


def send(connection: socket.socket, message: bytes) -> None:
    """Write a message with its length before it."""
    connection.sendall(len(message).to_bytes(_LENGTH, "little") + message)


def receive(connection: socket.socket) -> bytes:
    """Read a message with its length before it.

    Raises:
        MessageError: If it is too large, or the connection ends within it.
    """
    size = int.from_bytes(_exactly(connection, _LENGTH), "little")
    if size > MOST_BYTES:
        raise MessageError(f"A message claims {size} bytes, expected at most {MOST_BYTES}.")
    return _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        chunk = connection.recv(min(2**20, size - len(found)))
        if not chunk:
            raise MessageError(f"The connection ended after {len(found)} of {size} bytes.")
        found += chunk
    return bytes(found)
