"""Who may speak to the viewer, and how much: checked before anything else looks at a request.

A page from elsewhere in the same browser can send requests here and, by a name that it lets point here (DNS rebinding),
even read the answers; other users of the machine can connect as well. So the Host header must be ours, every request
but the one that brings the token must bring the cookie that was given for it, and whatever changes something must come
from a page of ours (Origin).
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import secrets
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 256 << 10  # bytes
MAX_TARGET = 4 << 10  # bytes of path and query
MAX_HEADERS = 16 << 10  # bytes of all
MOST_HEADERS = 64
BODY_SECONDS = 10.0
METHODS = {"GET", "HEAD", "POST", "DELETE"}
SAFE = {"GET", "HEAD"}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
ENTERED = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><title>likely</title>'
    '<meta http-equiv="refresh" content="0;url=/"><p><a href="/">To the viewer</a></p></html>'
)
LOCKED_OUT = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><title>likely</title><h1>Not signed in</h1>'
    "<p>Open the address that <code>likely view</code> printed. It works once; where it was used, start "
    "<code>likely view</code> again.</p></html>"
)
log = logging.getLogger("likely.view")


class RefusedError(Exception):
    """A request that is answered with a status and one sentence."""

    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message
        super().__init__(message)


def answer(value: Any, status: int = 200) -> Response:
    """JSON that every browser can read: what is not finite is null, and text is escaped to ASCII."""
    try:
        text = json.dumps(value, default=str, allow_nan=False)
    except ValueError:
        text = json.dumps(json.loads(json.dumps(value, default=str), parse_constant=lambda _: None))
    return Response(text, status, media_type="application/json")


class Access:
    """The token and the session. The token is good for one exchange; the cookie for as long as the process lives."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self.token = secrets.token_urlsafe(32)
        self._session = secrets.token_urlsafe(32)
        self._used = False

    @property
    def address(self) -> str:
        """Where a browser of this machine enters."""
        wild = self._host in {"0.0.0.0", "::"}  # noqa: S104  (compared, not bound)
        host = "127.0.0.1" if wild else self._host
        return f"http://{f'[{host}]' if ':' in host else host}:{self._port}/login?token={self.token}"

    @property
    def _cookie(self) -> str:
        return f"likely-{self._port}"  # cookies know no ports: two viewers must not take each other's

    def enter(self, token: str) -> Response:
        """The cookie for the token.

        Raises:
            RefusedError: it is another one, or was used.
        """
        right = hmac.compare_digest(token.encode(errors="replace"), self.token.encode())
        if not right or self._used:
            raise RefusedError(401, "this address is not, or no longer, good: it works once")
        self._used = True
        response = Response(ENTERED, media_type="text/html")
        response.set_cookie(self._cookie, self._session, httponly=True, samesite="strict", path="/")
        return response

    def check(self, scope: Scope) -> None:
        """Refuse what is not from a page of ours.

        Raises:
            RefusedError: with the status that fits.
        """
        headers = _headers(scope)
        if scope["method"] not in METHODS:
            raise RefusedError(405, "this method is not used here")
        if len(scope["raw_path"] or b"") + len(scope["query_string"]) > MAX_TARGET:
            raise RefusedError(414, "the address is too long")
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise RefusedError(421, "this host is not served here")
        if scope["path"] == "/login":
            return
        if not self._has_session(headers.get("cookie", "")):
            raise RefusedError(401, "open the address that likely view printed")
        site = headers.get("sec-fetch-site", "none")
        if site not in {"same-origin", "none"} and scope["path"] != "/":
            raise RefusedError(403, "this request comes from another site")
        if scope["method"] not in SAFE and headers.get("origin") != f"http://{host}":
            raise RefusedError(403, "this request comes from another site")

    def _is_ours(self, host: str) -> bool:
        name, _, port = host.rpartition(":")
        if port != str(self._port):
            return False
        if name in {"127.0.0.1", "localhost", "[::1]"} or name.strip("[]") == self._host:
            return True
        try:  # an address in numbers is no name that somebody could let point here
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return self._host in {"0.0.0.0", "::"}  # noqa: S104  (compared, not bound)

    def _has_session(self, header: str) -> bool:
        # Cookies know no ports, so those of any other server of this machine come along, however they are written.
        pairs = [part.strip().partition("=") for part in header.split(";")]
        given = [value.encode(errors="replace") for name, _, value in pairs if name == self._cookie]
        return any(hmac.compare_digest(value, self._session.encode()) for value in given)


def _headers(scope: Scope) -> Mapping[str, str]:
    """The headers by name.

    Raises:
        RefusedError: there are too many, or one that decides is there twice.
    """
    raw = scope["headers"]
    if len(raw) > MOST_HEADERS or sum(len(name) + len(value) for name, value in raw) > MAX_HEADERS:
        raise RefusedError(431, "too many headers")
    found: dict[str, str] = {}
    for name, value in raw:
        key = name.decode("latin-1").lower()
        if key in found and key in {"host", "origin", "cookie", "sec-fetch-site", "content-length"}:
            raise RefusedError(400, "a header is there twice")
        found[key] = value.decode("latin-1")
    return found


class Gate:
    """The app behind its checks; its errors in one line, never with a traceback."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        begun = False

        async def guarded(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                kept = [(name, value) for name, value in message["headers"] if name.decode().lower() not in HEADERS]
                message = {**message, "headers": kept + [(k.encode(), v.encode()) for k, v in HEADERS.items()]}
            await send(message)

        try:
            self._access.check(scope)
            if scope["path"] == "/login":
                response = self._login(scope)
                await response(scope, receive, guarded)
            else:
                await self._app(scope, _bounded(scope, receive), guarded)
        except RefusedError as refused:
            if not begun:
                await _refusal(scope, refused)(scope, receive, guarded)
        except Exception as error:
            log.exception("a request failed")
            if not begun:
                message = f"a bug of ours ({type(error).__name__}); please report it"
                await answer({"error": message}, 500)(scope, receive, guarded)

    def _login(self, scope: Scope) -> Response:
        if scope["method"] != "GET":
            raise RefusedError(405, "this method is not used here")
        token = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        return self._access.enter(token)


def _refusal(scope: Scope, refused: RefusedError) -> Response:
    wants_page = scope["path"] in {"/", "/login"} and refused.status == 401
    if wants_page:
        return Response(LOCKED_OUT, refused.status, media_type="text/html")
    return answer({"error": refused.message}, refused.status)


def _bounded(scope: Scope, receive: Receive) -> Callable[[], Any]:
    """``receive`` for a body of bounded length that arrives in bounded time."""
    left = MAX_BODY
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if not declared.isdigit() or int(declared) > MAX_BODY:
        raise RefusedError(413, f"more than {MAX_BODY >> 10} KiB")
    whole = False
    deadline = asyncio.get_running_loop().time() + BODY_SECONDS

    async def next_message() -> Message:
        nonlocal left, whole
        if whole:
            return await receive()  # waits for the browser to leave
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise RefusedError(408, "the request took too long to arrive") from None
        if message["type"] == "http.request":
            left -= len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if left < 0:
                raise RefusedError(413, f"more than {MAX_BODY >> 10} KiB")
        return message

    return next_message
