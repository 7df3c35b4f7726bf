"""What the server does with requests that no page of ours sends: a status, one sentence, and it goes on."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from client import Viewer

from likely.errors import ConfigError
from likely.web.access import MAX_BODY, METHODS
from likely.web.app import MAX_STREAMS
from likely.web.serve import listen


@pytest.fixture(autouse=True)
def _still_there(viewer: Viewer) -> object:
    yield
    assert viewer.get("/api/runs")[0] == 200


def refused(body: bytes, viewer: Viewer) -> None:
    """One sentence, with neither a traceback nor a path of this machine."""
    text = body.decode()
    assert "Traceback" not in text
    assert str(Path.home()) not in text
    assert "/tmp" not in text  # noqa: S108
    assert ".py" not in text
    assert len(text) < 500
    assert viewer.cookie.partition("=")[2] not in text


@pytest.mark.parametrize(
    "host",
    [
        "evil.com",
        "127.0.0.1.evil.com",
        "localhost.evil.com:{port}",
        "127.0.0.1",
        "127.0.0.1:1",
        "evil.com:{port}",
        "127.0.0.1:{port}.evil.com",
        "[::2]:{port}",
        "[fe80::1%25eth0]:{port}",
        "10.0.0.1:{port}",
        "user@127.0.0.1:{port}",
    ],
)
def test_a_host_that_is_not_ours(viewer: Viewer, host: str) -> None:
    status, _, body = viewer.get("/api/runs", host=host.format(port=viewer.port))
    assert status == 421
    refused(body, viewer)


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "[::1]:{port}"])
def test_hosts_that_are_ours(viewer: Viewer, host: str) -> None:
    assert viewer.get("/api/runs", host=host.format(port=viewer.port))[0] == 200


def test_without_a_host_or_with_two(viewer: Viewer) -> None:
    for hosts in (b"", f"Host: 127.0.0.1:{viewer.port}\r\nHost: evil.com\r\n".encode()):
        answer = viewer.raw(b"GET /api/runs HTTP/1.1\r\n" + hosts + b"Connection: close\r\n\r\n")
        assert answer.split()[1] in {b"400", b"421"}


@pytest.mark.parametrize(
    "cookie", ["", "likely={value}", "likely-{port}=", "likely-{port}=x", "likely-{port}={value}x", "=;\x01"]
)
def test_without_the_session_nothing_is_told(viewer: Viewer, cookie: str) -> None:
    cookie = cookie.format(port=viewer.port, value=viewer.cookie.partition("=")[2])
    for path in ("/", "/api/runs", "/static/js/main.js", "/api/jobs", "/nothing"):
        status, _, body = viewer.get(path, cookie=cookie)
        assert status == 401
        assert b"likely view" in body
        refused(body, viewer)


def test_the_token_works_once(run_folder: Path) -> None:
    viewer = Viewer(run_folder, enter=False)
    try:
        path = viewer.address.removeprefix(viewer.origin)
        for wrong in ("/login", "/login?token=", "/login?token=x", path[:-1], "/login?token=%00", "/login?token=%ff"):
            assert viewer.get(wrong)[0] == 401
        assert viewer.request("POST", path, b"")[0] == 405
        status, headers, body = viewer.get(path)
        assert status == 200
        assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(headers["set-cookie"].split("; "))
        assert path.partition("=")[2].encode() not in body
        assert viewer.get(path)[0] == 401  # replayed
        viewer.cookie = headers["set-cookie"].partition(";")[0]
        assert viewer.get("/api/runs")[0] == 200
        status, headers, _ = viewer.get("/favicon.ico")  # browsers ask for it behind the redirection
        assert (status, headers["content-type"]) == (200, "image/svg+xml")
    finally:
        assert viewer.close() == 0


@pytest.mark.parametrize(
    "given",
    [
        {"origin": ""},
        {"origin": "null"},
        {"origin": "http://evil.com"},
        {"origin": "https://127.0.0.1:{port}"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "http://localhost:{port}"},
        {"origin": "http://127.0.0.1:{port}", "sec_fetch_site": "cross-site"},
        {"origin": "http://127.0.0.1:{port}", "sec_fetch_site": "same-site"},
    ],
    ids=str,
)
def test_what_changes_something_comes_from_a_page_of_ours(viewer: Viewer, given: dict[str, str], run_id: str) -> None:
    given = {name: value.format(port=viewer.port) for name, value in given.items()}
    before = viewer.json("/api/jobs")["jobs"]
    status, body = viewer.post("/api/jobs", {"kind": "check", "run": run_id}, **given)
    assert status == 403
    refused(json.dumps(body).encode(), viewer)
    assert viewer.request("DELETE", "/api/jobs/x", **{"origin": ""} | given)[0] == 403
    assert viewer.json("/api/jobs")["jobs"] == before


def test_a_stream_or_a_file_is_not_for_another_site(viewer: Viewer, run_id: str) -> None:
    for path in (f"/api/runs/{run_id}/live", f"/api/runs/{run_id}", "/static/js/main.js"):
        for site in ("cross-site", "same-site"):
            assert viewer.get(path, sec_fetch_site=site)[0] == 403


def test_a_form_of_another_kind_is_no_request(viewer: Viewer, run_id: str) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, _ = viewer.post("/api/jobs", {"kind": "check", "run": run_id}, content_type=kind)
        assert status == 415


@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "POST", "DELETE"])
def test_methods_that_are_not_used(viewer: Viewer, method: str) -> None:
    given = {"origin": viewer.origin, "access_control_request_method": "POST"}
    status, headers, body = viewer.request(method, "/api/runs", **given)
    assert status == 405
    assert not [name for name in headers if name.startswith("access-control")]
    refused(body, viewer)
    assert {"GET", "HEAD", "POST", "DELETE"} == METHODS


@pytest.mark.parametrize(
    "path",
    [
        "/static/../access.py",
        "/static/%2e%2e/access.py",
        "/static/..%2faccess.py",
        "/static/..%5caccess.py",
        "/static/%00",
        "/static/index.html%00.js",
        "/static//etc/passwd",
        "/static/%c0%ae%c0%ae/access.py",
        "//etc/passwd",
        "/static/",
        "/static/js",
        "/static/js/",
        "/static/__init__.py",
        "/api/runs/../../etc/passwd",
        "/api/runs/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/api/runs/%2Ftmp",
        "/api/runs/file:%2f%2f%2fetc%2fpasswd",
        "/api/runs/%00",
        "/api/scores/..%2f..%2fetc%2fpasswd",
        "/api/scores/%2Fetc%2Fpasswd/rows",
        "/api/jobs/__proto__",
        "/openapi.json",
        "/docs",
        "/.git/config",
    ],
)
def test_nothing_is_found_by_a_path(viewer: Viewer, path: str) -> None:
    status, _, body = viewer.get(path)
    assert status == 404
    refused(body, viewer)


def test_rows_are_numbers_of_the_set(viewer: Viewer, scores_id: str) -> None:
    for row in ("-1", "99", "1e3", "0x0", "%D9%A1", "9" * 30, "rows.csv%00", "..", "1.0", ""):
        assert viewer.get(f"/api/scores/{scores_id}/rows/{row}")[0] == 404
    for query in (
        "sort=;%20DROP%20TABLE%20rows",
        "order=up",
        "limit=0",
        "limit=501",
        "limit=x",
        "cursor=n-1",
        "cursor=n99999",
    ):
        assert viewer.get(f"/api/scores/{scores_id}/rows?{query}")[0] == 400
    for query in ("cursor=__proto__", "source=x", f"text={'a' * 201}", "cursor=n%D9%A1"):
        status, _, body = viewer.get(f"/api/scores/{scores_id}/rows?{query}")
        assert status == 400
        refused(body, viewer)


def test_sizes_are_bounded(viewer: Viewer) -> None:
    assert viewer.get("/api/runs?" + "a" * 5000)[0] == 414
    assert viewer.get("/api/runs", x_long="a" * 17_000)[0] in {400, 431}
    many = "".join(f"X-{i}: 1\r\n" for i in range(1000))
    base = f"GET /api/runs HTTP/1.1\r\nHost: 127.0.0.1:{viewer.port}\r\nCookie: {viewer.cookie}\r\n"
    assert viewer.raw(f"{base}{many}Connection: close\r\n\r\n".encode()).split()[1] in {b"400", b"431"}
    assert viewer.raw(b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n").split()[1:2] in ([b"400"], [b"414"], [])
    assert viewer.raw(b"\x16\x03\x01\x02\x00" * 100).split()[1:2] in ([b"400"], [])
    big = b"[" * (MAX_BODY + 1)
    given = {"origin": viewer.origin, "content_type": "application/json"}
    assert viewer.request("POST", "/api/jobs", big, **given)[0] == 413
    assert viewer.request("POST", "/api/jobs", big[:200_000], **given)[0] == 400
    head = f"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1:{viewer.port}\r\nCookie: {viewer.cookie}\r\n"
    head += f"Origin: {viewer.origin}\r\nContent-Type: application/json\r\n"
    chunk = b"10000\r\n" + b"a" * 65536 + b"\r\n"
    answer = viewer.raw(f"{head}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode() + chunk * 6)
    assert answer.split()[1:2] in ([b"413"], [])  # closed with bytes unread, which may take the answer with it
    answer = viewer.raw(f"{head}Content-Length: -5\r\nConnection: close\r\n\r\n".encode())
    assert answer.split()[1] in {b"400", b"413"}


def test_odd_requests(viewer: Viewer) -> None:
    upgrade = {"upgrade": "websocket", "connection": "Upgrade", "sec_websocket_key": "x" * 22 + "=="}
    status, headers, _ = viewer.get("/api/runs", sec_websocket_version="13", **upgrade)
    assert status != 101
    assert "upgrade" not in headers
    for ranges in ("bytes=0-1,2-3", "bytes=-99999999999", "bytes=" + "0-0," * 500 + "1-1"):
        status, headers, _ = viewer.get("/static/js/main.js", range=ranges)
        assert status == 200
        assert "content-range" not in headers
    assert viewer.get("/static/js/main.js", if_none_match='"\x7f' + "W/" * 50)[0] in {200, 400}
    status, headers, _ = viewer.get("/api/runs?x=%0d%0aset-cookie:%20a=b")
    assert status == 200
    assert "set-cookie" not in headers
    assert (
        viewer.get("/api/runs", x_forwarded_host="evil.com", x_forwarded_for="1.2.3.4", forwarded="host=evil")[0] == 200
    )


@pytest.mark.parametrize("path", ["/", "/api/runs", "/nothing", "/static/js/main.js", "/api/scores"])
def test_every_answer_is_closed_to_other_sites(viewer: Viewer, path: str) -> None:
    for cookie in (viewer.cookie, ""):
        _, headers, _ = viewer.get(path, cookie=cookie, origin="http://evil.com")
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cache-control"] == "no-store"
        assert not [name for name in headers if name.startswith("access-control")]
        assert "server" not in headers


@pytest.mark.parametrize(
    "ask",
    [
        1,
        [],
        {},
        {"kind": "__proto__"},
        {"kind": "check"},
        {"kind": "check", "run": "x", "model": "/etc"},
        {"kind": "index", "scores": "/etc/passwd"},
        {"kind": "mask", "run": "x", "line": 0},
        {"kind": "generate", "run": "x", "prompt": "a", "max_tokens": 10**9},
        {"kind": "lens", "run": "x", "prompt": "a", "answer": "", "rivals": 3},
        {"kind": "lens", "run": "x", "prompt": "a", "answer": "b", "learning_rate": float("inf")},
        {"kind": "token", "set": "x", "row": 0, "position": 0},
        {"kind": "token", "set": "x", "row": True, "position": 1},
    ],
    ids=str,
)
def test_asks_are_checked(viewer: Viewer, ask: object) -> None:
    status, body = viewer.post("/api/jobs", ask)
    assert status == 400
    refused(json.dumps(body).encode(), viewer)


def test_what_was_asked_is_not_said_back_whole(viewer: Viewer, run_id: str) -> None:
    for ask in ({"kind": "k" * 100_000}, {"kind": "check", "run": run_id, "k" * 100_000: 1}):
        status, body = viewer.post("/api/jobs", ask)
        assert status == 400
        refused(json.dumps(body).encode(), viewer)


def test_cookies_of_other_servers_of_this_machine_don_t_hide_ours(viewer: Viewer) -> None:
    name = viewer.cookie.partition("=")[0]
    for other in ('prefs={"a": 1}', 'a="x\\"y', "a[b]=c d,e", "=", "a", f"{name}=x"):
        assert viewer.get("/api/runs", cookie=f"{other}; {viewer.cookie}")[0] == 200
        assert viewer.get("/api/runs", cookie=f"{viewer.cookie};{other}")[0] == 200
        assert viewer.get("/api/runs", cookie=f"{other}; x{viewer.cookie}; {name}={other}")[0] == 401


def test_what_is_not_there_is_not_asked_of(viewer: Viewer, scores_id: str) -> None:
    for ask in (
        {"kind": "check", "run": "../../etc"},
        {"kind": "example", "set": "x", "row": 0, "state": "base"},
        {"kind": "example", "set": scores_id, "row": 10**6, "state": "base"},
        {"kind": "example", "set": scores_id, "row": 0, "state": "../../etc"},
        {"kind": "example", "set": scores_id, "row": 0, "state": "step-000099"},
    ):
        assert viewer.post("/api/jobs", ask)[0] == 404


def test_streams_are_bounded_and_given_back(viewer: Viewer, run_id: str) -> None:
    head = f"GET /api/runs/{run_id}/live HTTP/1.1\r\nHost: 127.0.0.1:{viewer.port}\r\nCookie: {viewer.cookie}\r\n\r\n"
    streams = []
    for _ in range(MAX_STREAMS):
        stream = socket.create_connection(("127.0.0.1", viewer.port), 10)
        stream.sendall(head.encode())
        assert b" 200 " in stream.recv(4096)
        streams.append(stream)
    assert viewer.get(f"/api/runs/{run_id}/live")[0] == 503
    for stream in streams:
        stream.close()
    until = time.monotonic() + 10
    while time.monotonic() < until:
        with socket.create_connection(("127.0.0.1", viewer.port), 10) as again:
            again.sendall(head.encode())
            if b" 200 " in again.recv(4096):
                return
        time.sleep(0.2)
    raise AssertionError("the streams were not given back")


@contextmanager
def _ending(process: subprocess.Popen[str]) -> Iterator[None]:
    """Who fails must not wait for a process that nobody ends."""
    try:
        yield
    finally:
        process.kill()


def test_slow_and_idle_connections_are_ended(run_folder: Path) -> None:
    """In a viewer of its own, whose patience is short."""
    code = (
        "from likely.web import access, serve; serve.REQUEST_SECONDS = access.BODY_SECONDS = 1.0;"
        "import sys; from likely.__main__ import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "view", str(run_folder), "--port", "0", "--no-browser"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process, _ending(process):
        address = process.stdout.readline().strip()
        port = int(address.split(":")[2].split("/")[0])
        slow = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(200)]
        slow[0].sendall(b"GET / HTTP/1.1\r\nHost: 127")  # and no more
        for connection in slow:
            with suppress(ConnectionResetError):
                assert connection.recv(100) == b""
            connection.close()
        head = f"GET {address.partition(str(port))[2]} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), 10) as good:
            good.sendall(head.encode())
            answer = good.recv(4096).decode()
            assert " 200 " in answer
            cookie = answer.partition("set-cookie: ")[2].partition(";")[0]
        head = f"GET /nothing HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        slower = []  # they ask once, without a session
        for more, then in (("\r\n", "G"), ("\r\n", "GET / HTTP/1.1\r\nHost: 127"), ("Content-Length: 9\r\n\r\n", "{")):
            later = socket.create_connection(("127.0.0.1", port), 10)
            later.sendall((head + more).encode())
            assert b" 401 " in later.recv(4096)
            with suppress(ConnectionError):
                later.sendall(then.encode())
            slower.append(later)
        for later in slower:
            with later, suppress(ConnectionError):
                while later.recv(4096):
                    pass
        head = f"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nCookie: {cookie}\r\n"
        head += f"Origin: http://127.0.0.1:{port}\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{{"
        with socket.create_connection(("127.0.0.1", port), 10) as body:
            body.sendall(head.encode())
            assert b" 408 " in body.recv(4096)
        process.terminate()
        assert process.wait(20) == 143


def test_a_port_that_is_taken_is_one_line(viewer: Viewer, run_folder: Path) -> None:
    def view(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "likely", "view", str(run_folder), "--no-browser", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    taken = view("--port", str(viewer.port))
    assert taken.returncode == 5
    assert taken.stderr == (
        f"error: --port {viewer.port}: the port can't be used: another program listens there;"
        " name another, or --port 0 for a free one\n"
    )
    for host in ("192.0.2.1", "no such host"):
        with pytest.raises(ConfigError, match="address of this machine"):
            listen(host, 0)
    assert view("--scores", str(run_folder / "run.json")).returncode == 2
