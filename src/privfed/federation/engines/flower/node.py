"""A site's side of its own SuperNode: takes tasks as Flower's SuperExec would, and answers them in this process.

A SuperNode with ``--isolation process`` leaves it to others to run its ClientApp. Flower's SuperExec would install the
app bundle that the server sent and start a process with it for each message. This module takes the same tasks from the
SuperNode's runtime API, checks the bundle's digest against the site's list, *never runs what is in it*, and lets the
site's installed code answer: what a site does with its data is not for the server to ship. It saves the start of a
process, and of torch, at every message as well.

It uses the runtime API of Flower 1.41, which is not a public one; the extra ``flower`` pins that version.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection

import httpx
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from privfed.federation.engines.flower.client_app import answer
from privfed.federation.progress import Progress

PAUSE = 0.1
LONG_PAUSE = 1.0


class NodeTasks:
    """The tasks of one SuperNode, one after the other.

    Args:
        address: Of the SuperNode's runtime API, on this machine.
        handle: The site: bytes in, bytes out.
        bundles: SHA-256 of the app bundles to answer for, as hex; empty for any.
        watch: Told what is refused.
    """

    def __init__(
        self, address: str, handle: Callable[[bytes], bytes], bundles: Collection[str], watch: Progress
    ) -> None:
        self._address, self._handle, self._bundles, self._watch = address, handle, frozenset(bundles), watch
        self._client = self._connected(RuntimeVersionHttpInterceptor(component_name="SuperExec"))

    def serve(self, going: Callable[[], bool]) -> None:
        """Answer tasks while ``going``; a SuperNode that is not there is waited for."""
        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        while going():
            try:
                found = self._client.AcquireTask(request)
            except httpx.HTTPError:  # not there yet, or started again
                time.sleep(LONG_PAUSE)
                continue
            if found.HasField("task") and found.token:
                self._answer(found.token)
            else:
                time.sleep(PAUSE)

    def _answer(self, token: str) -> None:
        client = self._connected(
            RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), RuntimeTokenHttpInterceptor(token)
        )
        beat = HeartbeatSender(lambda: _alive(client))
        beat.start()
        try:
            message, context, _, bundle = pull_task_input(client)
            push_message(client, self.reply(message, bundle.content), context)
            push_task_output(client=client, context=context, sub_status=SubStatus.COMPLETED, details="")
        except (httpx.HTTPError, RuntimeError) as error:  # the server asks again, or goes on without this site
            self._watch.message(f"A message was not answered: {error}")
        finally:
            beat.stop()
            client.close()

    def reply(self, message: Message, bundle: bytes) -> Message:
        """Return the answer to a message that came with an app bundle: the site's, or an error if it is not listed."""
        digest = hashlib.sha256(bundle).hexdigest()
        if self._bundles and digest not in self._bundles:
            reason = f"The app bundle {digest} is not on this site's list (accept.bundles)."
            self._watch.message(f"Refused a message: {reason}")
            return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message)
        return answer(message, self._handle)

    def _connected(
        self, *interceptors: RuntimeVersionHttpInterceptor | RuntimeTokenHttpInterceptor
    ) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            server_address=self._address,
            insecure=True,  # this machine's loopback
            root_certificates=None,
            interceptors=list(interceptors),
        )


def _alive(client: RuntimeHttpClient) -> bool:
    try:
        return bool(client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)
    except httpx.HTTPError:
        return False
