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
from typing import Any

import httpx
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from privfed.federation.engines.flower.client_app import answer
from privfed.federation.progress import Progress

PAUSE = 0.1
LONG_PAUSE = 1.0
STALLED_SECONDS = 60.0
_UNANSWERED = (httpx.HTTPError, RuntimeError, TimeoutError, ObjectPullError, ObjectPushError)


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
        self._run: int | None = None

    def serve(self, going: Callable[[], bool]) -> str | None:
        """Answer tasks while ``going``; a SuperNode that is not there is waited for.

        A SuperNode pulls a message, then waits for *a* reply. One that never gets it waits for good; one that is left
        with the reply to a message of a run that died sends every later reply one message late. Such a SuperNode has
        to be started anew, which costs nothing that the server does not ask for again.

        Returns:
            Why the SuperNode has to be started anew; None where it does not.
        """
        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        while going():
            try:
                found = self._client.AcquireTask(request)
            except httpx.HTTPError:  # not there yet, or started again
                time.sleep(LONG_PAUSE)
                continue
            if not (found.HasField("task") and found.token):
                time.sleep(PAUSE)
                continue
            reason = self._answer(found.token)
            if reason is not None:
                return reason
        return None

    def _answer(self, token: str) -> str | None:
        """Answer one message; return why that could not be."""
        client = self._connected(
            RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), RuntimeTokenHttpInterceptor(token)
        )
        beat = HeartbeatSender(lambda: _alive(client))
        beat.start()
        client.PullObject = impatient(client.PullObject)
        try:
            message, context, run, bundle = pull_task_input(client)
            if self._run not in (None, run.run_id):
                return "another of Flower's runs has begun"
            self._run = run.run_id
            push_message(client, self.reply(message, bundle.content), context)
            push_task_output(client=client, context=context, sub_status=SubStatus.COMPLETED, details="")
        except _UNANSWERED as error:  # the server asks again, or goes on without this site
            return f"a message was not answered: {error}"
        finally:
            beat.stop()
            client.close()
        return None

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


def impatient(pull: Callable[..., Any], seconds: float = STALLED_SECONDS) -> Callable[..., Any]:
    """Return a call that fetches one object from the SuperNode, and gives up once none has come for some time.

    The SuperNode hands out a task before it has all of its message from the SuperLink. Where that ends meanwhile the
    rest never comes, and Flower's own functions would go on asking for it for more than an hour.

    Args:
        pull: The SuperNode's call; its reply says whether the object is there.
        seconds: How long to wait for the next object.
    """
    came = time.monotonic()

    def patiently(request: Any) -> Any:
        nonlocal came
        reply = pull(request)
        if reply.object_available:
            came = time.monotonic()
        elif time.monotonic() - came > seconds:
            raise TimeoutError(f"the rest of it has not come for {seconds:g} s")
        return reply

    return patiently


def _alive(client: RuntimeHttpClient) -> bool:
    try:
        return bool(client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)
    except httpx.HTTPError:
        return False
