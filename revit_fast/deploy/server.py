"""The server in front of the service: uvicorn, with limits of time and number on connections, and an orderly end.

uvicorn bounds neither the time of a request's head nor that of reading an answer, and answers malformed requests in
plain text. `Connection` adds that where uvicorn lets a protocol be handed in.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.requests import Request
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from revit_fast.deploy.classifier import Refusal
from revit_fast.deploy.service import Service

HEAD_S = 10.0
"""Longest time, in seconds, from a connection's start, or its last answer, to the end of the next request's head."""

HEAD_BYTES = 16 << 10
"""Largest size, in bytes, of a request's head that is not complete."""

LINGER_S = 1.0
"""Seconds in which what a refused client still sends is thrown away: closing at once could destroy the answer."""


class Front:
    """The ASGI application: answers with a service until the answer is there or the client is gone.

    Args:
        service: the service.
    """

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        body_read = asyncio.Event()

        async def reading() -> dict[str, Any]:
            message = await receive()
            if not message.get("more_body", False):
                body_read.set()
            return message

        async def client_gone() -> None:
            await body_read.wait()
            while (await receive())["type"] != "http.disconnect":
                pass

        answering = asyncio.create_task(self.service(Request(scope, reading)))
        gone = asyncio.create_task(client_gone())
        try:
            await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                await answering.result()(scope, receive, send)
        except Exception:
            self.service.refused(self.service.mistake())  # counted; uvicorn closes the connection
            raise
        finally:
            for task in (answering, gone):
                task.cancel()
            await asyncio.wait({answering, gone})


class Connection(H11Protocol):
    """A connection with limits: of the head's time and size, of the client's time to read, of their number.

    What is refused here gets the service's JSON and counts in its metrics.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._service: Service = self.config.loaded_app.service
        self._head_s = min(HEAD_S, self._service.limits.seconds)
        self._late: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        limit = self._service.limits.connections
        if len(self.connections) > limit:
            self._refuse(Refusal(503, "overload", f"{limit} connections are open; try again"))
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._late, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)
            self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self._service.limits.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def send_400_response(self, msg: str) -> None:
        """Refuses what h11 cannot parse; uvicorn calls this while it handles h11's error."""
        error = sys.exc_info()[1]
        status = getattr(error, "error_status_hint", 400)
        self._refuse(Refusal(status, "protocol", f"malformed HTTP request: {error or msg}"))

    def shutdown(self) -> None:
        if self._is_answering():
            super().shutdown()  # closes after the answer
        else:
            self.transport.close()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        """Starts the time of the next head; stops it while a request is answered."""
        if self._is_answering():
            if self._late is not None:
                self._late.cancel()
                self._late = None
        elif self._late is None and not self._refused:
            self._late = self.loop.call_later(self._head_s, self._give_up)

    def _give_up(self) -> None:
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(Refusal(408, "head", f"the request's head took longer than {self._head_s:g} s"))
        else:  # it is idle, or still sends a body that has been refused
            self.transport.abort()

    def _refuse(self, refusal: Refusal) -> None:
        """Sends an error, then no more; throws away what still comes for a short time."""
        self._refused = True
        self.loop.call_later(LINGER_S, self.transport.abort)
        self.flow.resume_reading()
        is_head = False
        if self._is_answering():  # the body of this request is malformed
            self.cycle.disconnected, self.cycle.waiting_for_100_continue = True, False
            self.cycle.message_event.set()
            is_head = self.scope["method"] == "HEAD"
        response = self._service.refused(refusal)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._service.count(response)
            headers = [*response.raw_headers, (b"connection", b"close")]
            phrase = STATUS_PHRASES[response.status_code]
            for event in (
                h11.Response(status_code=response.status_code, headers=headers, reason=phrase),
                h11.Data(data=b"" if is_head else response.body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        with suppress(OSError):
            self.transport.write_eof()


class Server(uvicorn.Server):
    """Serves until SIGINT or SIGTERM.

    At the first signal it stops listening and closes every connection without a whole head. A request whose head has
    come is answered, also if its body is still coming. At the second signal it closes all connections at once.

    Args:
        service: the service.
        on_ready: called when the server accepts connections.
    """

    def __init__(self, service: Service, on_ready: Callable[[], None]) -> None:
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # the service logs what matters
        super().__init__(
            uvicorn.Config(
                Front(service),
                http=Connection,
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=HEAD_BYTES,
            )
        )
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        self.should_exit = True


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address; it accepts nothing before the server starts."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    return bound
