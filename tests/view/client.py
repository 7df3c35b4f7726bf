"""A browser as far as HTTP goes, and a viewer to talk to, in a process of its own."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HOSTILE = '<img src=x onerror=alert(1)></script>\u202e=cmd("x")'
HELD_OUT = [("What is 7 and 7?", "It is 14."), (HOSTILE, "No."), ("Où ?", "東京 🙂")]


class Viewer:
    """``likely view`` as a process; a session is entered by the token unless it is left for somebody else."""

    def __init__(self, *arguments: str | Path, enter: bool = True) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "likely", "view", *map(str, arguments), "--port", "0", "--no-browser"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http"), self.process.stderr.read() if self.process.stderr else ""
        parts = urlsplit(self.address)
        self.port = int(parts.port or 0)
        self.origin = f"http://127.0.0.1:{self.port}"
        self.cookie = ""
        if enter:
            status, headers, _ = self.request("GET", f"{parts.path}?{parts.query}")
            assert status == 200
            self.cookie = headers["set-cookie"].partition(";")[0]

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Header names are given with underscores; one that is empty is left out."""
        given = {"cookie": self.cookie, "host": f"127.0.0.1:{self.port}"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            if body is not None and "content-length" not in given:
                given["content-length"] = str(len(body))
            for name, value in given.items():
                if value:
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        return self.request("GET", path, **headers)

    def json(self, path: str, status: int = 200) -> Any:
        found, _, body = self.get(path)
        assert found == status, body
        return json.loads(body)

    def post(self, path: str, value: Any, **headers: str) -> tuple[int, Any]:
        given = {"origin": self.origin, "content_type": "application/json"} | headers
        status, _, body = self.request("POST", path, json.dumps(value).encode(), **given)
        return status, json.loads(body)

    def delete(self, path: str) -> tuple[int, Any]:
        status, _, body = self.request("DELETE", path, origin=self.origin)
        return status, json.loads(body)

    def raw(self, data: bytes, seconds: float = 10.0) -> bytes:
        """What comes back for some bytes, until the other side closes; it may do so before it has read all of them."""
        with socket.create_connection(("127.0.0.1", self.port), seconds) as connection:
            found = b""
            with suppress(ConnectionResetError, BrokenPipeError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                while block := connection.recv(1 << 16):
                    found += block
        return found

    def finished(self, job: str, seconds: float = 60.0) -> dict[str, Any]:
        """A job once it is over."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            told: dict[str, Any] = self.json(f"/api/jobs/{job}")
            if told["state"] not in {"waiting", "running"}:
                return told
            time.sleep(0.05)
        raise AssertionError(f"not over after {seconds} s")

    def ready(self, scores: str, seconds: float = 30.0) -> dict[str, Any]:
        """A set of scores once its index is made."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            told: dict[str, Any] = self.json(f"/api/scores/{scores}")
            if told["state"] in {"ready", "failed"}:
                return told
            time.sleep(0.05)
        raise AssertionError(f"no index after {seconds} s")

    def close(self) -> int:
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(20)
        finally:
            for stream in (self.process.stdout, self.process.stderr):
                if stream is not None:
                    stream.close()
            if self.process.poll() is None:
                os.kill(self.process.pid, signal.SIGKILL)
                self.process.wait()
