"""The server by HTTP: its answers, whom it refuses, who hangs up, and how it begins and ends."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any

import pytest

from neox.reference import shipped
from neox.reference.batching import Limits
from neox.reference.checkpoint.load import load
from neox.reference.generate import CachedDecoder, Request, complete
from neox.reference.model import Model
from neox.reference.sampling import Sampling
from neox.reference.tokenizer import Tokenizer, load_tokenizer

WHY = "starlette and uvicorn are not installed: pip install -e '.[serve]'"
pytest.importorskip("starlette", reason=WHY)
pytest.importorskip("uvicorn", reason=WHY)

from serving import SERVE, Running, answer_on, events_of, program, serving, started  # noqa: E402 - needs them

Json = dict[str, Any]
CaptureFixture = pytest.CaptureFixture[str]
LONG = {"prompt": "Once", "max_tokens": 300, "ignore_eos": True, "stream": True}


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(shipped.path())


@cache
def model() -> Model:
    return load(shipped.path(), dtype="float64")


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(model(), tokenizer(), Limits(1000, running=3, waiting=2)) as server:
        yield server


@pytest.fixture
def server(running: Running) -> Iterator[Running]:
    """The same for all tests; each leaves it without a text."""
    yield running
    running.backend.delay, running.backend.broken, running.backend.overflowing = 0.0, False, False
    running.wait_until(running=0, waiting=0, positions=0)


def expected_text(prompt: str, tokens: int, seed: int, temperature: float = 1.0) -> str:
    request = Request(tokenizer().encode(prompt), tokens, Sampling(temperature, seed=seed))
    return complete(CachedDecoder(model()), [request], tokenizer())[0].text


# Answers.


def test_a_completion_is_what_the_model_continues(server: Running) -> None:
    status, body = server.post({"prompt": "Once upon", "max_tokens": 12, "seed": 3, "model": "tiny", "user": "me"})
    assert status == 200
    text = expected_text("Once upon", 12, 3)
    assert body["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}]
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    assert re.fullmatch("cmpl-[0-9a-f]{24}", body["id"])
    assert abs(body["created"] - time.time()) < 100
    prompt = len(tokenizer().encode("Once upon"))
    assert body["usage"] == {"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12}


def test_a_stream_is_the_same_in_pieces(server: Running) -> None:
    asked = {"prompt": ["Once", "\u00e9"], "n": 2, "seed": 4, "max_tokens": 9, "echo": True, "logprobs": 1}
    whole = server.post(asked)[1]
    streamed = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    status, headers, content = answer_on(server.send(streamed))
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    *parts, last = events_of(content)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert len({part["id"] for part in parts}) == 1
    assert len(parts) > 20
    for choice in whole["choices"]:
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [name for part in own for name in part["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]
        assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]


def test_requests_at_the_same_time_do_not_mix(server: Running) -> None:
    def ask(seed: int) -> str:
        text: str = server.post({"prompt": "Once upon", "max_tokens": 30, "seed": seed})[1]["choices"][0]["text"]
        return text

    with ThreadPoolExecutor(5) as pool:
        assert [*pool.map(ask, range(5))] == [expected_text("Once upon", 30, seed) for seed in range(5)]


def test_the_other_endpoints(server: Running) -> None:
    text = "Once upon a t\u00efme<|endoftext|>"
    ids = tokenizer().encode(text)
    card = server.get("/v1/models")[1]["data"][0]
    assert (card["id"], card["object"]) == ("tiny", "model")
    assert server.get("/v1/models/tiny") == (200, card)
    assert server.get("/v1/models/large")[0] == 404
    context = model().config.max_position_embeddings
    tokenized = {"tokens": ids, "count": len(ids), "max_model_len": context}
    assert server.post({"prompt": text, "add_special_tokens": False}, "/tokenize") == (200, tokenized)
    assert server.post({"tokens": ids}, "/detokenize") == (200, {"prompt": text})
    info = server.get("/tokenizer_info")[1]
    assert (info["eos_token"], info["bos_token"]) == ("<|endoftext|>", "<|endoftext|>")
    assert server.get("/health") == (200, {"status": "ok", "running": 0, "waiting": 0, "positions": 0})


# Refusals.


def error_in(answer: tuple[int, Json]) -> tuple[int, str]:
    status, body = answer
    error = body["error"]
    assert body == {"error": {"message": error["message"], "type": error["type"], "param": None, "code": None}}
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return status, error["message"]


REFUSED = [
    ({"prompt": "Once", "top_p": 2}, 400, "top_p must be"),
    ({"prompt": "Once", "model": "large"}, 404, "there is no model 'large' here, only 'tiny'"),
    ({"prompt": [10**30]}, 400, "token ids must be integers"),
    ({"prompt": [5000000]}, 400, "token id 5000000 is outside the vocabulary"),
    ({"prompt": [-1]}, 400, "token id -1 is outside the vocabulary"),
    ({"prompt": [1] * 1001}, 400, "the prompt has 1001 tokens, but the model's context is"),
    ({"prompt": "a", "n": 6}, 400, "6 choices are more than the 5"),
    (b"{", 400, "the body is not JSON"),
    (b"\x00" * 4096, 400, "the body is not JSON"),
    (b"x" * 4097, 413, "the body is larger than the 4096 bytes that are accepted"),
    (b"x" * 60000, 413, "the body is larger than the 4096 bytes"),
]


@pytest.mark.parametrize(("body", "status", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_cannot_be_answered_is_refused(server: Running, body: object, status: int, message: str) -> None:
    found, text = error_in(server.post(body))
    assert found == status
    assert message in text


def test_a_prompt_of_one_token_too_many_is_refused(server: Running) -> None:
    context = model().config.max_position_embeddings
    assert error_in(server.post({"prompt": [1] * (context + 1)}))[0] == 400
    assert server.post({"prompt": [1] * context, "max_tokens": 5})[1]["usage"]["completion_tokens"] == 1


def test_a_huge_body_is_cut_off(server: Running) -> None:
    """Announced as huge, it is refused at once; sent without an announcement, as soon as it is."""
    connection = server.send(b"", Content_Length=str(10**12))
    assert answer_on(connection)[0] == 413
    connection = server.send(b"", Content_Length="", Transfer_Encoding="chunked")
    part = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    sent = 0
    with connection, suppress(OSError):
        while sent < 10**8:
            connection.sendall(part)
            sent += len(part)
    assert sent < 10**8


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_of_another_kind_is_refused(server: Running, kind: str) -> None:
    assert error_in(server.post({"prompt": "a"}, Content_Type=kind))[0] == 415


def test_a_page_of_the_web_is_refused(server: Running) -> None:
    """A name of the web that was given the address 127.0.0.1 is still in the Host header."""
    assert error_in(server.get("/health", host="evil.example:8000"))[0] == 403
    for host in ("localhost", f"127.0.0.1:{server.port}", "[::1]:8000"):
        assert server.get("/health", host=host)[0] == 200


def test_paths_and_methods_that_are_none(server: Running) -> None:
    assert error_in(server.get("/v1/chat/completions"))[0] == 404
    assert error_in(server.get("/v1/completions"))[0] == 405


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", [{}, {"prompt": 3}, {"tokens": "a"}, {"tokens": [-1]}, {"x": 1}, []])
def test_the_tokenizer_refuses_too(server: Running, path: str, body: object) -> None:
    assert error_in(server.post(body, path))[0] == 400


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",  # the beginning of TLS
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 10**6,
    ],
    ids=["TLS", "no version", "negative length", "no size", "endless header"],
)
def test_what_is_no_http_is_answered_by_400_or_nothing(server: Running, raw: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while part := connection.recv(4096):
                answer += part
        except ConnectionResetError:
            pass
    assert not answer or answer.startswith(b"HTTP/1.1 400")
    assert server.get("/health")[0] == 200


def test_a_full_queue_asks_to_retry(server: Running) -> None:
    server.backend.delay = 0.05
    connections = [server.send(LONG) for _ in range(5)]
    server.wait_until(running=3, waiting=2)
    status, headers, content = answer_on(server.send({"prompt": "a"}))
    assert error_in((status, json.loads(content)))[0] == 503
    assert headers["retry-after"] == "1"
    # All or none of a request: one place would be there for the first of two.
    connections.pop().close()
    server.wait_until(running=3, waiting=1)
    assert server.post({"prompt": ["a", "b"]})[0] == 503
    server.wait_until(running=3, waiting=1)
    for connection in connections:
        connection.close()


# Hanging up.


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_hangs_up_frees_the_place(server: Running, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("uvicorn.error").addHandler(caplog.handler)
    server.backend.delay = 0.05  # 300 steps would take 15 seconds
    connection = server.send({**LONG, "stream": stream, "n": 2})
    server.wait_until(running=2)
    if stream:
        assert connection.recv(10)
    connection.close()
    server.wait_until(running=0, positions=0, seconds=8)
    time.sleep(0.1)
    assert caplog.messages == []  # nothing to report
    logging.getLogger("uvicorn.error").removeHandler(caplog.handler)


def test_hanging_up_before_the_body_is_complete_changes_nothing(server: Running) -> None:
    server.send(b'{"prompt"', Content_Length="100").close()
    assert server.post({"prompt": "a"})[0] == 200


def test_whoever_hangs_up_while_waiting_leaves_the_queue(server: Running) -> None:
    server.backend.delay = 0.05
    connections = [server.send(LONG) for _ in range(5)]
    server.wait_until(running=3, waiting=2)
    for connection in connections:
        connection.close()
    server.wait_until(running=0, waiting=0, seconds=8)


def test_who_does_not_read_holds_up_nobody(server: Running) -> None:
    slow = server.send({**LONG, "max_tokens": 60, "logprobs": 100, "n": 2})
    status, body = server.post({"prompt": "Once upon", "max_tokens": 12, "seed": 3})
    assert status == 200
    assert body["choices"][0]["text"] == expected_text("Once upon", 12, 3)
    server.wait_until(running=0)  # its text is complete, and kept until it is read
    assert len(events_of(answer_on(slow)[2])) == 2 * 60


def test_a_body_that_does_not_arrive_is_not_waited_for(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program(), "PATIENCE", 0.2)
    assert answer_on(server.send(b'{"prompt"', Content_Length="100"))[0] == 408


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux gives up connections by itself")
def test_who_takes_nothing_for_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    listen = program().listen

    def listen_with_little_memory(host: str, port: int) -> socket.socket:
        listener: socket.socket = listen(host, port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    monkeypatch.setattr(program(), "PATIENCE", 1)
    monkeypatch.setattr(program(), "listen", listen_with_little_memory)
    with serving(model(), tokenizer(), Limits(1000)) as server:
        # An answer of about a megabyte, which fits nowhere on the way.
        slow = server.send({**LONG, "max_tokens": 200, "logprobs": 100, "n": 2})
        time.sleep(0.5)
        assert server.connections() == 1
        for _ in range(200):
            if not server.connections():
                break
            time.sleep(0.05)
        assert server.connections() == 0
        slow.close()


# What goes wrong in the model.


def test_a_model_that_fails_is_an_error_and_not_the_end(server: Running, capfd: CaptureFixture) -> None:
    server.backend.delay, server.backend.broken = 0.3, True
    connections = [server.send({**LONG, "stream": stream}) for stream in (True, False)]
    (event,) = events_of(answer_on(connections[0])[2])
    assert "the server's own output says why" in event["error"]["message"]
    assert answer_on(connections[1])[0] == 500
    server.backend.delay, server.backend.broken = 0.0, False
    assert server.post({"prompt": "a"})[0] == 200
    assert "RuntimeError: lost the device" in capfd.readouterr().err


def test_logits_that_are_not_finite_are_an_error(server: Running) -> None:
    server.backend.overflowing = True
    assert "not finite" in error_in(server.post({"prompt": "a"}))[1]


# Clients that others wrote.


def test_the_client_of_openai(server: Running) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert [card.id for card in client.models.list()] == ["tiny"]
        asked = {"model": "tiny", "prompt": "Once upon", "max_tokens": 9, "seed": 2}
        text = expected_text("Once upon", 9, 2)
        answer = client.completions.create(**asked, logprobs=2, echo=True)
        assert answer.choices[0].text == "Once upon" + text
        assert answer.choices[0].logprobs.text_offset[0] == 0
        assert answer.usage.completion_tokens == 9
        stream = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        parts = [*stream]
        assert "".join(part.choices[0].text for part in parts[:-1]) == text
        assert parts[-1].usage.completion_tokens == 9
        drawn = client.completions.create(**asked, extra_body={"top_k": 1})
        assert drawn.choices[0].text == expected_text("Once upon", 9, 2, temperature=0.0)
        with pytest.raises(openai.BadRequestError, match="logprobs must be 0 or more"):
            client.completions.create(**asked, logprobs=1000)
        with pytest.raises(openai.NotFoundError, match="there is no model 'large'"):
            client.completions.create(model="large", prompt="a")


# The program.


def test_ctrl_c_ends_it_at_once_whoever_is_connected() -> None:
    with started("--name", "mine", "--positions", "100000") as (process, server), server.connect():
        assert server.get("/v1/models")[1]["data"][0]["id"] == "mine"
        going = server.send({**LONG, "max_tokens": 10**6, "n": 16})
        server.wait_until(running=16)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        events = events_of(answer_on(going)[2])
        assert events[-1]["error"]["message"] == "the server is being stopped"
        assert process.stderr is not None
        assert process.stderr.read() == "stopped\n"
        assert process.wait(10) == 0
        assert time.monotonic() - begin < 5


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
def test_the_kernels_answer_as_the_reference() -> None:
    asked = {"prompt": "Once upon a time", "max_tokens": 6, "temperature": 0}
    drawn = {**asked, "temperature": 1, "seed": 5}
    texts = []
    for flags in ([], ["--backend", "gpu", "--device", "host", "--dtype", "float32", "--texts", "2"]):
        with started(*flags) as (process, server):
            status, answer = server.post(asked)
            assert status == 200
            texts.append(answer["choices"][0]["text"])
            plain, scored = (server.post({**drawn, **more})[1]["choices"][0] for more in ({}, {"logprobs": 1, "n": 2}))
            assert plain["text"] == scored["text"] != texts[-1]
            assert len(scored["logprobs"]["tokens"]) == 6
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
    assert texts[0] == texts[1] != ""


def ended(*flags: str) -> tuple[int, str]:
    process = subprocess.run(
        [sys.executable, str(SERVE), *flags], capture_output=True, text=True, timeout=60, check=False
    )
    return process.returncode, process.stderr.splitlines()[-1]


def test_a_taken_port_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, line = ended("--port", str(port))
    assert status == 2
    assert line.startswith(f"error: cannot listen at 127.0.0.1, port {port} (Address already in use): choose another")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "error: --port must be between 0 and 65535, not 70000"),
        (["--host", "nowhere.invalid"], "error: cannot listen at nowhere.invalid, port 8000 ("),
        (["--max-body", "0"], "error: --max-body must be 1 or more, not 0"),
        (["--texts", "0"], "error: running must be 1 or more, not 0"),
        (["--device", "host"], "error: --device belongs to --backend gpu"),
        (["--backend", "gpu", "--weights", "stored"], "error: --weights belongs to --backend reference"),
        (["--dtype", "float16"], "error: --backend reference computes in float32, float64, not float16"),
    ],
    ids=lambda value: str(value),
)
def test_bad_flags_are_one_line(flags: list[str], message: str) -> None:
    status, line = ended(*flags)
    assert status == 2
    assert line.startswith(message)


def test_a_missing_package_is_one_line() -> None:
    blocker = "import sys, runpy; sys.modules['uvicorn'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    process = subprocess.run([sys.executable, "-c", blocker, str(SERVE)], capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr.endswith(': pip install "neox20b[serve]"\n')
    assert process.stderr.count("\n") == 1
