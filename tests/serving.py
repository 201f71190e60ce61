"""A server of examples/serve.py in a thread of the tests, and raw connections to it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from neox.reference.batching import Batch, Limits, ReferenceBackend, Segment
from neox.reference.decode import Cache
from neox.reference.model import Array, Model
from neox.reference.tokenizer import Tokenizer

SERVE = Path(__file__).resolve().parents[1] / "examples" / "serve.py"
Json = dict[str, Any]


@cache
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_program", SERVE)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


class Slow(ReferenceBackend):
    """A model whose steps take as long as a test wants, or fail."""

    delay = 0.0
    broken = False
    overflowing = False

    def advance(self, segments: Sequence[Segment[Cache]]) -> list[Array]:
        time.sleep(self.delay)
        if self.broken:
            raise RuntimeError("lost the device")
        logits = super().advance(segments)
        for rows in logits if self.overflowing else []:
            rows[...] = float("nan")
        return logits


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    port: int
    backend: Any = None  # a Slow, where it runs in this process
    server: Any = None  # of uvicorn, likewise

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def send(self, body: bytes | object, path: str = "/v1/completions", **headers: str) -> socket.socket:
        """A connection on which this was posted."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": str(len(content))}
        lines |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
        connection = self.connect()
        connection.sendall(f"POST {path} HTTP/1.1\r\n{head}Connection: close\r\n\r\n".encode() + content)
        return connection

    def post(self, body: bytes | object, path: str = "/v1/completions", **headers: str) -> tuple[int, Json]:
        status, _, content = answer_on(self.send(body, path, **headers))
        return status, json.loads(content)

    def get(self, path: str, host: str = "localhost") -> tuple[int, Json]:
        connection = self.connect()
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        status, _, content = answer_on(connection)
        return status, json.loads(content)

    def connections(self) -> int:
        """That are open, seen from the server."""
        return len(self.server.server_state.connections)

    def wait_until(self, seconds: float = 60.0, **load: int) -> None:
        """Until /health reports this load."""
        end = time.monotonic() + seconds
        while True:
            reported = self.get("/health")[1]
            if all(reported[name] == count for name, count in load.items()):
                return
            assert time.monotonic() < end, f"{reported}, expected {load}"
            time.sleep(0.01)


def answer_on(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and content of an answer that ends with its connection."""
    with connection, connection.makefile("rb") as file:
        status = int(file.readline().split()[1])
        headers: dict[str, str] = {}
        while line := file.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        content = file.read()
    return status, headers, unchunked(content) if headers.get("transfer-encoding") == "chunked" else content


def unchunked(content: bytes) -> bytes:
    parts = []
    while content:
        size, _, rest = content.partition(b"\r\n")
        parts.append(rest[: int(size, 16)])
        content = rest[int(size, 16) + 2 :]
    return b"".join(parts)


def events_of(content: bytes) -> list[Json]:
    """The objects of a stream, which must have ended with [DONE]."""
    events = content.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


@contextmanager
def serving(model: Model, tokenizer: Tokenizer, limits: Limits, body: int = 4096) -> Iterator[Running]:
    """A server of this model at a free port of this machine."""
    serve = program()
    backend = Slow(model)
    batch = Batch(backend, limits, tokenizer)
    listener = serve.listen("127.0.0.1", 0)
    ready = threading.Event()
    app = serve.application(batch, "tiny", model.config.max_position_embeddings, tokenizer, body, lambda _: ready.set())
    server = serve.Server(serve.settings(serve.only_for(serve.LOOPBACK, app), connections=300))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    assert ready.wait(30)
    try:
        yield Running(listener.getsockname()[1], backend, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def started(*flags: str) -> Iterator[tuple[subprocess.Popen[str], Running]]:
    """A server as a process of its own, on one core: threads of OpenBLAS wait for each other where others compute."""
    command, env = [sys.executable, str(SERVE), "--port", "0", *flags], {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=env) as process:
        try:
            assert process.stderr is not None
            lines = (re.search(r"http://127\.0\.0\.1:(\d+)/v1", line) for line in process.stderr)
            yield process, Running(int(next(filter(None, lines))[1]))
        finally:
            process.kill()
