"""Serve a GPT-NeoX model to programs that speak OpenAI's completions API.

    python examples/serve.py
    python examples/serve.py --model pythia-70m --port 8080
    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "Once upon a time"}'

Requests are continued side by side, in one batch that texts join and leave at every token. /v1/completions takes
prompt (text or token ids, or a list of either), max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed,
n, stop, ignore_eos, logprobs, echo, stream. Beside it: /v1/models, /tokenize, /detokenize, /tokenizer_info, /health.

There is no password: the server listens on this machine alone, unless --host says otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import queue
import re
import secrets
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from neox.reference import shipped
from neox.reference.batching import Backend, Batch, Event, Failure, Full, Job, Limits, ReferenceBackend
from neox.reference.checkpoint.hub import find
from neox.reference.checkpoint.load import load
from neox.reference.completions import (
    FLAG,
    TEXT,
    WHOLE,
    Asked,
    Choice,
    Fields,
    Json,
    joined,
    parsed,
    read_asked,
    usage_of,
)
from neox.reference.config import Config
from neox.reference.errors import InputError, Parser, run
from neox.reference.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Receive, Scope, Send
except ImportError as missing:
    print(f'error: a server needs more packages ({missing}): pip install "neox20b[serve]"', file=sys.stderr)
    sys.exit(2)

DTYPES = {"reference": ("float32", "float64"), "gpu": ("float16", "bfloat16", "float32")}  # the default first
PATIENCE = 60  # seconds, for a body to arrive and for what was sent to be taken
GRACE = 3  # seconds, for answers to be ended when the server stops
OVERSIZE = (
    16  # times the limit of a body, up to which it is taken in, so that whoever sends it hears that it is too large
)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# The batch, in a thread of its own.


class Stopped(Exception):
    """The server is being stopped."""


class Broken(Exception):
    """The model failed, for a reason that is no fault of the request."""


Heard = tuple[int, Event] | Exception  # the number of a job and what happened to it; or the end of all


@dataclass
class Visit:
    """The texts of one request: what is heard of them goes into a queue of the event loop."""

    jobs: Sequence[Job]
    heard: asyncio.Queue[Heard]
    numbers: dict[int, int] = field(default_factory=dict)  # of jobs, by handle


class Engine:
    """Steps a batch as long as there is something in it, in a thread, to which everything private belongs."""

    def __init__(self, batch: Batch[Any]) -> None:
        self.load = {"running": 0, "waiting": 0, "positions": 0}
        self._batch = batch
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._visits: dict[int, Visit] = {}  # by handle
        self._stopped = self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @asynccontextmanager
    async def visit(self, jobs: Sequence[Job]) -> AsyncIterator[asyncio.Queue[Heard]]:
        """The events of these texts, which leave the batch when the block ends, however it ends.

        InputError, Full or Stopped if one of them is refused; then none of them stays.
        """
        visit = Visit(jobs, asyncio.Queue())
        entered: asyncio.Future[None] = self._loop.create_future()
        self._inbox.put(partial(self._enter, visit, entered))
        try:
            await entered
            yield visit.heard
        finally:
            self._inbox.put(partial(self._leave, visit))

    def stop(self) -> None:
        """End all texts, and take no more. May be called from a signal handler."""
        self._inbox.put(self._stop)

    def close(self) -> None:
        """End the thread, and wait until it has."""
        self._inbox.put(self._close)
        self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            self._obey()
            try:
                events = self._batch.step()
            except Exception:
                traceback.print_exc()
                self._end_all(Broken("the model failed: the server's own output says why"))
            else:
                self._deliver([(self._visits[event.index], event) for event in events])
            self._publish()

    def _obey(self) -> None:
        """Do what was asked in the meantime; with nothing else to do, wait for it."""
        with suppress(queue.Empty):
            while not self._closed:
                self._publish()
                self._inbox.get(block=self._batch.running + self._batch.waiting == 0)()

    def _enter(self, visit: Visit, entered: asyncio.Future[None]) -> None:
        try:
            if self._stopped:
                raise Stopped("the server is being stopped")
            for number, job in enumerate(visit.jobs):
                handle = self._batch.submit(job)
                visit.numbers[handle] = number
                self._visits[handle] = visit
        except Exception as error:  # those of the visit that are in the batch leave it with the visit
            self._call(settle, entered, error)
        else:
            self._call(settle, entered, None)

    def _leave(self, visit: Visit) -> None:
        for handle in visit.numbers:
            self._batch.cancel(handle)
            self._visits.pop(handle, None)

    def _stop(self) -> None:
        self._stopped = True
        self._end_all(Stopped("the server is being stopped"))

    def _close(self) -> None:
        self._stop()
        self._closed = True

    def _end_all(self, error: Exception) -> None:
        for visit in {id(visit): visit for visit in self._visits.values()}.values():
            self._leave(visit)
            self._call(visit.heard.put_nowait, error)

    def _deliver(self, events: Sequence[tuple[Visit, Event]]) -> None:
        def put() -> None:
            for visit, event in events:
                visit.heard.put_nowait((visit.numbers[event.index], event))

        if events:
            self._call(put)

    def _publish(self) -> None:
        batch = self._batch
        self.load = {"running": batch.running, "waiting": batch.waiting, "positions": batch.positions}

    def _call(self, function: Callable[..., object], *args: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(function, *args)


def settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return  # whoever waited for it has gone
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


# What is served, and errors in OpenAI's form.


@dataclass(frozen=True)
class Site:
    """What the endpoints know."""

    name: str  # of the model
    context: int
    tokenizer: Tokenizer
    limits: Limits
    body: int  # bytes that a request may have
    engine: Callable[[], Engine]  # once the event loop runs
    started: int = field(default_factory=lambda: int(time.time()))


class HttpError(Exception):
    """An answer other than the one that was asked for."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def error_body(status: int, message: str) -> Json:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def described(error: Exception) -> tuple[int, str]:
    """The status and the message of an answer that an error makes."""
    match error:
        case HttpError():
            return error.status, str(error)
        case InputError():
            return 400, str(error)
        case Full():
            return 503, "as many texts as may wait are waiting already: try again later"
        case Stopped():
            return 503, str(error)
        case HTTPException():
            return error.status_code, f"{error.detail}: see /health, /v1/models and POST /v1/completions"
    return 500, str(error) if isinstance(error, Broken) else "an error in the server: its own output says more"


async def answer_error(request: Request, error: Exception) -> Response:
    status, message = described(error)
    headers = {"Retry-After": "1"} if status == 503 else {}
    return JSONResponse(error_body(status, message), status, headers)


# Requests.


async def read_object(site: Site, request: Request) -> Json:
    """The object of JSON in the body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page in a browser can post any other kind to this machine without asking.
        raise HttpError(415, 'the body must be JSON: send "Content-Type: application/json"')
    try:
        body = await asyncio.wait_for(read_body(request, site.body), PATIENCE)
    except asyncio.TimeoutError as error:
        raise HttpError(408, f"the body did not arrive within {PATIENCE} seconds") from error
    return parsed(body)


async def read_body(request: Request, most: int) -> bytes:
    """The body; refused once it is complete, since many clients hear of an error only when they have sent all."""
    announced = request.headers.get("content-length", "0")
    received, body = int(announced) if announced.isdecimal() else 0, bytearray()
    too_large = HttpError(413, f"the body is larger than the {most} bytes that are accepted")
    if received > OVERSIZE * most:
        raise too_large
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        body += chunk if received <= most else b""
        if received > OVERSIZE * most:
            break
    if received > most:
        raise too_large
    return bytes(body)


Result = TypeVar("Result")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of the work, which is given up when the client hangs up: ClientDisconnect."""

    async def hung_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, listening = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait((doing, listening), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        doing.cancel()
        listening.cancel()
        await asyncio.gather(doing, listening, return_exceptions=True)


# /v1/completions.


class Answer(Response):
    """The choices of one request, as they come or when they are complete."""

    def __init__(self, site: Site, asked: Asked) -> None:
        self._site, self._asked = site, asked
        self._choices = [Choice(i, job, asked, site.tokenizer) for i, job in enumerate(asked.jobs)]
        self._identity, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnect):
            await while_connected(receive, self._produce(scope, receive, send))

    async def _produce(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._site.engine().visit(self._asked.jobs) as heard:
            if self._asked.stream:
                await self._stream(heard, send)
            else:
                await JSONResponse(await self._whole(heard))(scope, receive, send)

    async def _whole(self, heard: asyncio.Queue[Heard]) -> Json:
        parts: list[list[Json]] = [[] for _ in self._choices]
        async for part in self._parts(heard):
            parts[part["index"]].append(part)
        return self._envelope([joined(of_choice) for of_choice in parts], usage_of(self._asked, self._choices))

    async def _stream(self, heard: asyncio.Queue[Heard], send: Send) -> None:
        """Events as browsers know them, the last of which is [DONE]. An error that comes now is one of them."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for part in self._parts(heard):
                await send_event(send, json.dumps(self._envelope([part])))
            if self._asked.usage:
                await send_event(send, json.dumps(self._envelope([], usage_of(self._asked, self._choices))))
        except (Broken, Stopped) as error:
            await send_event(send, json.dumps(error_body(*described(error))))
        await send_event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b""})

    async def _parts(self, heard: asyncio.Queue[Heard]) -> AsyncIterator[Json]:
        while not all(choice.ended for choice in self._choices):
            news = await heard.get()
            if isinstance(news, Exception):
                raise news
            number, event = news
            if isinstance(event, Failure):
                raise Broken(str(event.error))
            if (part := self._choices[number].feed(event)) is not None:
                yield part

    def _envelope(self, choices: Sequence[Json], usage: Json | None = None) -> Json:
        return {
            "id": self._identity,
            "object": "text_completion",
            "created": self._created,
            "model": self._site.name,
            "choices": choices,
            **({} if usage is None else {"usage": usage}),
        }


async def send_event(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


async def completions(site: Site, request: Request) -> Response:
    body = await read_object(site, request)
    most = site.limits.running + site.limits.waiting
    asked = await asyncio.to_thread(read_asked, body, site.tokenizer, most)  # long texts take long to encode
    if asked.model not in (None, site.name):
        raise HttpError(404, f"there is no model {asked.model!r} here, only {site.name!r}")
    return Answer(site, asked)


# The other endpoints.


def model_card(site: Site) -> Json:
    card = {"id": site.name, "object": "model", "created": site.started, "owned_by": "local"}
    return {**card, "max_model_len": site.context}


async def models(site: Site, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [model_card(site)]})


async def model(site: Site, request: Request) -> Response:
    if (name := request.path_params["name"]) != site.name:
        raise HttpError(404, f"there is no model {name!r} here, only {site.name!r}")
    return JSONResponse(model_card(site))


async def tokenize(site: Site, request: Request) -> Response:
    fields = Fields(await read_object(site, request))
    text: str | None = fields.take("prompt", TEXT, None)
    fields.take("add_special_tokens", FLAG, None)  # there are none to add
    fields.take("model", TEXT, None)
    fields.done()
    if text is None:
        raise InputError("prompt is missing: the text to be cut into tokens")
    ids = await asyncio.to_thread(site.tokenizer.encode, text)
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": site.context})


async def detokenize(site: Site, request: Request) -> Response:
    fields = Fields(await read_object(site, request))
    ids = fields.take_any("tokens")
    fields.take("model", TEXT, None)
    fields.done()
    if not isinstance(ids, list) or not all(WHOLE.holds(index) for index in ids):
        raise InputError("tokens must be a list of token ids")
    return JSONResponse({"prompt": site.tokenizer.decode(ids)})


async def tokenizer_info(site: Site, request: Request) -> Response:
    end = None if site.tokenizer.eos is None else END_OF_TEXT
    return JSONResponse({"eos_token": end, "bos_token": end, "pad_token": None, "vocab_size": site.tokenizer.size})


async def health(site: Site, request: Request) -> Response:
    engine = site.engine()
    status = 200 if engine.alive else 500
    return JSONResponse({"status": "ok" if engine.alive else "the model's thread has ended", **engine.load}, status)


# The application.

Endpoint = Callable[[Site, Request], Awaitable[Response]]
ENDPOINTS: tuple[tuple[str, str, Endpoint], ...] = (
    ("POST", "/v1/completions", completions),
    ("GET", "/v1/models", models),
    ("GET", "/v1/models/{name:path}", model),
    ("POST", "/tokenize", tokenize),
    ("POST", "/detokenize", detokenize),
    ("GET", "/tokenizer_info", tokenizer_info),
    ("GET", "/health", health),
)


def application(
    batch: Batch[Any], name: str, context: int, tokenizer: Tokenizer, body: int, ready: Callable[[Engine], None]
) -> Starlette:
    """What a server of ASGI runs. `ready` is called with the engine once there is one."""
    engines: list[Engine] = []
    site = Site(name, context, tokenizer, batch.limits, body, lambda: engines[0])

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engines.append(Engine(batch))
        ready(engines[0])
        yield
        await asyncio.to_thread(engines[0].close)

    routes = [Route(path, bound(endpoint, site), methods=[method]) for method, path, endpoint in ENDPOINTS]
    known = (HttpError, InputError, Full, Stopped, Broken, HTTPException, Exception)
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=dict.fromkeys(known, answer_error))


def bound(endpoint: Endpoint, site: Site) -> Callable[[Request], Awaitable[Response]]:
    async def of_site(request: Request) -> Response:
        return await endpoint(site, request)

    return of_site


def only_for(hosts: frozenset[str], app: ASGIApp) -> ASGIApp:
    """The application under these names alone: a page of the web can give its own name the address of this machine."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = re.sub(r":\d+$", "", Request(scope).headers.get("host", ""))
            if host.lower() not in hosts:
                message = f"this server is not known as {host!r}"
                await JSONResponse(error_body(403, message), 403)(scope, receive, send)
                return
        await app(scope, receive, send)

    return guarded


# The program.

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]", "::1"})


def parser() -> Parser:
    flags = Parser(description="Serve a model by OpenAI's completions API.", allow_abbrev=False)
    flags.add_argument("--model", metavar="PATH|NAME", help="a folder, or a name on huggingface.co such as pythia-70m")
    flags.add_argument("--revision", help="of a named model, such as step1000; of a folder, a folder inside it")
    flags.add_argument("--name", help="by which requests know the model: that of --model by default")
    flags.add_argument("--backend", choices=list(DTYPES), default="reference")
    flags.add_argument("--device", choices=["cuda", "host"], help="of --backend gpu; host runs its kernels on the CPU")
    every = list(dict.fromkeys(dtype for dtypes in DTYPES.values() for dtype in dtypes))
    flags.add_argument("--dtype", choices=every, help="to compute in: float32 by default, on the gpu float16")
    flags.add_argument("--weights", choices=["auto", "upcast", "stored", "streamed"], help="as of generate.py")
    flags.add_argument("--host", default="127.0.0.1", help="address to listen at: 0.0.0.0 is every one of this machine")
    flags.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    flags.add_argument("--texts", type=int, default=16, metavar="N", help="continued side by side")
    flags.add_argument("--queue", type=int, default=64, metavar="N", help="texts that may wait; more are told to retry")
    flags.add_argument("--positions", type=int, metavar="N", help="of all texts together: four contexts by default")
    flags.add_argument("--chunk", type=int, default=256, metavar="N", help="positions of prompts read in one step")
    flags.add_argument("--max-body", type=int, default=1 << 20, metavar="BYTES", help="that a request may have")
    return flags


def listen(host: str, port: int) -> socket.socket:
    """InputError if nobody can listen there."""
    if not 0 <= port < 1 << 16:
        raise InputError(f"--port must be between 0 and 65535, not {port}")
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        # Only system calls have a positive number; looking up a name has a message of its own.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise InputError(f"cannot listen at {host}, port {port} ({reason}): choose another --port or --host") from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Whoever takes nothing of what is sent is gone. The sockets of connections inherit it.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, PATIENCE * 1000)
    return listener


class Server(uvicorn.Server):
    """Ends the texts that are under way when it is told to stop, so that nobody waits for their ends."""

    stop: Callable[[], None] = staticmethod(lambda: None)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.stop()
        super().handle_exit(sig, frame)


def settings(app: ASGIApp, connections: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        limit_concurrency=connections,
        timeout_graceful_shutdown=GRACE,
    )


def serve(args: argparse.Namespace, batch: Batch[Any], name: str, context: int, tokenizer: Tokenizer) -> None:
    with listen(args.host, args.port) as listener:
        host, port = listener.getsockname()[:2]

        def ready(engine: Engine) -> None:
            server.stop = engine.stop
            note(f"{name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1 (Ctrl-C ends it)")

        app: ASGIApp = application(batch, name, context, tokenizer, args.max_body, ready)
        if args.host in LOOPBACK:
            app = only_for(LOOPBACK, app)
        else:
            note(f"whoever reaches {args.host} may use it: there is no password")
        # Connections that only wait take little, but there must be some end to them.
        server = Server(settings(app, 4 * (args.texts + args.queue) + 100))
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    note("stopped")


def check_backend(args: argparse.Namespace) -> None:
    """InputError for flags that do not belong together."""
    if args.backend == "gpu" and args.weights is not None:
        raise InputError("--weights belongs to --backend reference: on the gpu weights are always kept as --dtype")
    if args.backend != "gpu" and args.device is not None:
        raise InputError("--device belongs to --backend gpu")
    if args.dtype not in (None, *DTYPES[args.backend]):
        raise InputError(f"--backend {args.backend} computes in {', '.join(DTYPES[args.backend])}, not {args.dtype}")


def limits_of(args: argparse.Namespace, config: Config) -> Limits:
    """InputError if one of them admits nothing."""
    contexts = args.texts if args.backend == "gpu" else 4
    positions = contexts * config.max_position_embeddings if args.positions is None else args.positions
    return Limits(positions, args.texts, args.queue, args.chunk)


def open_backend(args: argparse.Namespace, folder: Path) -> tuple[Backend[Any], int]:
    """What computes, and the bytes of a number that it caches."""
    dtype = args.dtype or DTYPES[args.backend][0]
    if args.backend == "reference":
        loaded = load(folder, dtype=dtype, weights=args.weights or "auto")
        return ReferenceBackend(loaded), loaded.dtype.itemsize
    from neox import gpu
    from neox.gpu.batching import DeviceBackend

    on_device = gpu.load(folder, dtype=dtype, device=args.device or "cuda")
    return DeviceBackend(on_device, limits_of(args, on_device.config).positions), on_device.dtype.itemsize


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    check_backend(args)
    if args.max_body < 1:
        raise InputError(f"--max-body must be 1 or more, not {args.max_body}")
    # Weights that overflow are reported by an error of our own.
    warnings.simplefilter("ignore", RuntimeWarning)
    if args.model is None:
        note("model: the small one that comes with the package; others by --model, such as pythia-70m, or a folder")
    folder = shipped.path() if args.model is None else find(args.model, args.revision)
    tokenizer = load_tokenizer(folder)
    backend, itemsize = open_backend(args, folder)
    config = backend.config
    limits = limits_of(args, config)
    batch = Batch(backend, limits, tokenizer)
    size = 2 * limits.positions * config.num_hidden_layers * config.hidden_size * itemsize
    note(f"up to {args.texts} texts at a time, of {limits.positions} positions together: {size / 1e9:.3g} GB at most")
    name = args.name or (Path(args.model).name if args.model else "shipped")
    serve(args, batch, name, config.max_position_embeddings, tokenizer)


if __name__ == "__main__":
    run(main)
