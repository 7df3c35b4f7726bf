"""The server of the viewer: its socket, its bounds, its end."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from likely import stops
from likely.errors import ConfigError, ResourceError
from likely.web.access import MAX_HEADERS, Access, Gate
from likely.web.app import Viewer, make_app

MOST_CONNECTIONS = 128
REQUEST_SECONDS = 10.0  # for a whole head of a request, from the connection's beginning or from the head's own
IDLE_SECONDS = 20


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
        ResourceError: the port is taken, or not ours to take.
        ConfigError: there is no such host.
    """
    place = f"--port {port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError, OverflowError) as error:
        raise ConfigError(f"no address of this machine: {error}", place=f"--host {host}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(MOST_CONNECTIONS)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError("this is no address of this machine", place=f"--host {host}") from error
        reason = "another program listens there" if error.errno == errno.EADDRINUSE else error.strerror
        raise ResourceError(
            f"the port can't be used: {reason}", place=place, way_out="name another, or --port 0 for a free one"
        ) from error
    return bound


class _Patient(H11Protocol):
    """A connection that is closed where the head of a request, the first or a later one, does not arrive in time;
    uvicorn itself waits for ever once a head has begun."""

    _too_slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
            return
        self._too_slow = self.loop.call_later(REQUEST_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._wait_no_more()
        elif self._too_slow is None:
            self._too_slow = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)

    def _wait_no_more(self) -> None:
        if self._too_slow is not None:
            self._too_slow.cancel()
            self._too_slow = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)


def serve(viewer: Viewer, access: Access, bound: socket.socket, ready: Callable[[], None], *, debug: bool) -> None:
    """Answer until a signal ends it.

    Args:
        ready: is called once requests are answered.

    Raises:
        Stopped: by SIGTERM.
    """
    logging.getLogger("likely.view").setLevel(logging.ERROR if debug else logging.CRITICAL)
    config = uvicorn.Config(
        Gate(make_app(viewer), access),
        http=_Patient,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error" if debug else "critical",
        access_log=False,  # a line of it would hold the token
        server_header=False,
        date_header=False,
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS,
        backlog=MOST_CONNECTIONS,
        h11_max_incomplete_event_size=MAX_HEADERS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=1,
    )
    server = _Server(config, ready)
    server.run(sockets=[bound])
    if server.signum == signal.SIGTERM:  # an interrupt is how a viewer is meant to end
        raise stops.Stopped(server.signum)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready
        self.signum: int | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's own, but what was heard is not raised once more at the end: that would be a second signal, which
        ends the process at once."""

        def heard(signum: int, frame: FrameType | None) -> None:
            self.signum = signum
            self.handle_exit(signum, frame)

        before = {number: signal.signal(number, heard) for number in stops.SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()
