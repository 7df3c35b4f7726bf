"""The viewer's pages and what they ask: everything is looked up by an id, and no request waits for a model."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from likely.errors import LikelyError
from likely.web.access import RefusedError, answer
from likely.web.asks import can_score, make_job, read_ask
from likely.web.index import SORTED
from likely.web.jobs import Lane
from likely.web.runs import Run, Shelf
from likely.web.scores import ScoreSet, ScoreSets
from likely.web.table import Filter
from likely.web.tail import MAX_POINTS

STATIC = Path(__file__).parent / "static"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".json": "application/json",
    ".woff2": "font/woff2",
}
MAX_STREAMS = 16
STREAM_SECONDS = 3600.0
LOOK_SECONDS = 0.5
BEAT_SECONDS = 15.0
MAX_TEXT = 200
Answer = Callable[[Request], Awaitable[Response]]


class Viewer:
    """What all requests share.

    Args:
        version: of the program.
        models: the worker for everything that takes a model.
        indexes: the worker that makes indexes.
    """

    def __init__(self, shelf: Shelf, scores: list[Path], version: str, models: Lane, indexes: Lane) -> None:
        self.shelf, self.version, self.models, self.indexes = shelf, version, models, indexes
        self.sets = ScoreSets(shelf, scores, indexes)
        self.streams = 0
        self._looked = -LOOK_SECONDS
        self.files = {
            path.relative_to(STATIC).as_posix(): path
            for path in sorted(STATIC.rglob("*"))
            if path.is_file() and path.suffix in TYPES
        }

    async def look(self) -> None:
        """See what is new on the disk, and have indexed what is not."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            await run_in_threadpool(self.sets.look)
        self.sets.start()

    async def run(self, request: Request) -> Run:
        found = await run_in_threadpool(self.shelf.find, request.path_params["run"])
        if found is None:
            raise RefusedError(404, "there is no such run")
        return found

    async def scores(self, request: Request) -> ScoreSet:
        await self.look()
        return self.sets.find(request.path_params["scores"])


def make_app(viewer: Viewer) -> Starlette:
    """The app, to be put behind a :class:`likely.web.access.Gate`."""

    def route(path: str, handler: Callable[[Viewer, Request], Awaitable[Response]], method: str = "GET") -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                return await handler(viewer, request)
            except LikelyError as error:
                raise RefusedError(409, str(error)) from error

        return Route(path, endpoint, methods=[method])

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await viewer.models.close()
            await viewer.indexes.close()

    routes = [
        route("/", _document),
        route("/static/{path:path}", _static),
        route("/favicon.ico", _icon),
        route("/api/runs", _runs),
        route("/api/runs/{run}", _run),
        route("/api/runs/{run}/metrics", _metrics),
        route("/api/runs/{run}/live", _live),
        route("/api/scores", _sets),
        route("/api/scores/{scores}", _set),
        route("/api/scores/{scores}/rows", _rows),
        route("/api/scores/{scores}/count", _count),
        route("/api/scores/{scores}/scatter", _scatter),
        route("/api/scores/{scores}/rows.csv", _csv),
        route("/api/scores/{scores}/rows/{row}", _example),
        route("/api/jobs", _jobs),
        route("/api/jobs", _submit, "POST"),
        route("/api/jobs/{job}", _job),
        route("/api/jobs/{job}", _cancel, "DELETE"),
    ]
    handlers = {RefusedError: _refused, HTTPException: _http, Exception: _bug}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False  # an address is one of ours or it is not
    return app


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)  # noqa: S101
    return answer({"error": error.message}, error.status)


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    words = {404: "there is nothing at this address", 405: "this method is not used here"}
    return answer({"error": words.get(error.status_code, "the request can't be answered")}, error.status_code)


async def _bug(_: Request, error: Exception) -> Response:
    return answer({"error": f"a bug of ours ({type(error).__name__}); please report it"}, 500)


# --- files ---


async def _document(viewer: Viewer, _: Request) -> Response:
    return await _file(viewer, "index.html")


async def _static(viewer: Viewer, request: Request) -> Response:
    return await _file(viewer, request.path_params["path"])


async def _icon(viewer: Viewer, _: Request) -> Response:
    """What browsers ask for on the way of a redirection, before they have read a page that names the icon."""
    return await _file(viewer, "icon.svg")


async def _file(viewer: Viewer, name: str) -> Response:
    path = viewer.files.get(name)
    if path is None:
        raise RefusedError(404, "there is nothing at this address")
    return Response(await run_in_threadpool(path.read_bytes), media_type=TYPES[path.suffix])


# --- runs ---


async def _runs(viewer: Viewer, _: Request) -> Response:
    def read() -> list[dict[str, Any]]:
        return [run.entry() for run in viewer.shelf.runs()]

    return answer({"version": viewer.version, "runs": await run_in_threadpool(read)})


async def _run(viewer: Viewer, request: Request) -> Response:
    run = await viewer.run(request)
    await viewer.look()

    def read() -> dict[str, Any]:
        able, reason = can_score(run)
        return {
            **run.entry(),
            "config": run.config,
            "origins": run.origins,
            "report": run.report,
            "states": run.states(),
            "scores": viewer.sets.of_run(run),
            "can_score": able,
            "can_score_told": reason,
        }

    return answer(await run_in_threadpool(read))


async def _metrics(viewer: Viewer, request: Request) -> Response:
    run = await viewer.run(request)

    def read() -> dict[str, Any]:
        run.tail.refresh()
        return run.tail.since(0, run.num_steps, thin=True)

    return answer(await run_in_threadpool(read))


async def _live(viewer: Viewer, request: Request) -> Response:
    run = await viewer.run(request)
    generation, lines = _whole(request, "generation", None), _whole(request, "lines", None)
    if viewer.streams >= MAX_STREAMS:
        raise RefusedError(503, f"{MAX_STREAMS} pages follow runs already; close one")
    return _Live(viewer, _News(run, generation, lines))


class _Live(StreamingResponse):
    """A stream that counts for as long as it is answered."""

    def __init__(self, viewer: Viewer, news: _News) -> None:
        super().__init__(news.events(), media_type="text/event-stream")
        self._viewer = viewer
        viewer.streams += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._viewer.streams -= 1


class _News:
    """What one page that follows a run is told."""

    def __init__(self, run: Run, generation: int | None, lines: int | None) -> None:
        self._run, self._generation, self._lines = run, generation, lines
        self._entry: dict[str, Any] | None = None

    async def events(self) -> AsyncIterator[bytes]:
        began = said = time.monotonic()
        while time.monotonic() - began < STREAM_SECONDS:
            for name, value in await run_in_threadpool(self._news):
                said = time.monotonic()
                yield f"event: {name}\ndata: {json.dumps(value, allow_nan=False)}\n\n".encode()
            if time.monotonic() - said > BEAT_SECONDS:
                said = time.monotonic()
                yield b": still here\n\n"
            await asyncio.sleep(LOOK_SECONDS)

    def _news(self) -> list[tuple[str, Any]]:
        run, tail = self._run, self._run.tail
        found: list[tuple[str, Any]] = []
        entry = run.entry()  # which reads on in the metrics
        end = tail.num_lines
        far = end - (self._lines or 0) > MAX_POINTS  # what is so much is told as points of several steps
        news = tail.since(end if far or self._lines is None else self._lines, run.num_steps)
        if self._generation is not None and (far or news["generation"] != self._generation):
            found.append(("reset", {"generation": news["generation"]}))
        elif self._lines != news["lines"]:
            found.append(("metrics", news))
        self._generation, self._lines = news["generation"], news["lines"]
        if self._entry is None or any(self._entry[key] != entry[key] for key in ("state", "step", "verdict")):
            found.append(("state", entry))
        self._entry = entry
        return found


# --- scores ---


async def _sets(viewer: Viewer, _: Request) -> Response:
    await viewer.look()
    return answer({"sets": viewer.sets.all_told()})


async def _set(viewer: Viewer, request: Request) -> Response:
    return answer((await viewer.scores(request)).told())


async def _rows(viewer: Viewer, request: Request) -> Response:
    table = (await viewer.scores(request)).ready()
    wanted, (key, descending) = _filter(request), _order(request)
    limit = _whole(request, "limit", 50, least=1, most=500)
    cursor = request.query_params.get("cursor")

    def read() -> dict[str, Any]:
        try:
            return vars(table.page(wanted, key, descending=descending, limit=limit or 50, cursor=cursor))
        except ValueError as error:
            raise RefusedError(400, f"cursor: {error}") from error

    return answer(await run_in_threadpool(read))


async def _count(viewer: Viewer, request: Request) -> Response:
    table = (await viewer.scores(request)).ready()
    rows = await run_in_threadpool(table.count, _filter(request))
    return answer({"rows": rows, "of": table.num_rows})


async def _scatter(viewer: Viewer, request: Request) -> Response:
    table = (await viewer.scores(request)).ready()
    limit = _whole(request, "limit", 2000, least=1, most=5000)
    return answer(await run_in_threadpool(table.scatter, _filter(request), limit or 2000))


async def _csv(viewer: Viewer, request: Request) -> Response:
    table = (await viewer.scores(request)).ready()
    key, descending = _order(request)
    lines = table.csv(_filter(request), key, descending=descending)
    name = {"content-disposition": 'attachment; filename="rows.csv"'}
    return StreamingResponse(iterate_in_threadpool(lines), media_type="text/csv", headers=name)


async def _example(viewer: Viewer, request: Request) -> Response:
    found = await viewer.scores(request)
    text = request.path_params["row"]
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise RefusedError(404, "there is no such row")
    return answer(await run_in_threadpool(found.example, int(text)))


def _filter(request: Request) -> Filter:
    query = request.query_params
    text = query.get("text", "")
    if len(text) > MAX_TEXT:
        raise RefusedError(400, f"text: at most {MAX_TEXT} characters")
    switches = [query.get(name, "") in {"1", "true"} for name in ("worse", "stop_unlikely")]
    return Filter(text, query.get("role", ""), _whole(request, "source", None), *switches)


def _order(request: Request) -> tuple[str, bool]:
    key, order = request.query_params.get("sort", "id"), request.query_params.get("order", "asc")
    if key not in (*SORTED, "id") or order not in {"asc", "desc"}:
        raise RefusedError(400, f"sort is one of id, {', '.join(SORTED)}; order is asc or desc")
    return key, order == "desc"


def _whole(request: Request, name: str, default: int | None, *, least: int = 0, most: int = 10**12) -> int | None:
    text = request.query_params.get(name)
    if text is None or not text:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 13 or not least <= int(text) <= most:
        raise RefusedError(400, f"{name}: a whole number from {least} to {most}")
    return int(text)


# --- jobs ---


async def _jobs(viewer: Viewer, _: Request) -> Response:
    return answer(viewer.models.all_told())


async def _submit(viewer: Viewer, request: Request) -> Response:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise RefusedError(415, "send application/json")
    ask = read_ask(await request.body())
    await viewer.look()
    job = viewer.models.submit(await run_in_threadpool(make_job, ask, viewer.shelf, viewer.sets))
    return answer({"job": job.id}, 202)


async def _job(viewer: Viewer, request: Request) -> Response:
    return answer(viewer.models.told(viewer.models.find(request.path_params["job"])))


async def _cancel(viewer: Viewer, request: Request) -> Response:
    job = viewer.models.find(request.path_params["job"])
    viewer.models.cancel(job)
    return answer(viewer.models.told(job))
