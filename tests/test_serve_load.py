"""Two hundred clients at once, half of which hang up, beside others that send nonsense: from a process of their own."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest

WHY = "starlette and uvicorn are not installed: pip install -e '.[serve]'"
pytest.importorskip("starlette", reason=WHY)
pytest.importorskip("uvicorn", reason=WHY)

from serving import Running, started  # noqa: E402 - needs them

Json = dict[str, Any]
Text = tuple[str, str | None]  # of a choice, as far as it came, and its finish_reason

CLIENTS = 200
PROMPTS = ["Once upon a time", "The", "\u65e5\u672c \U0001f642", "a b c " * 10, "He said, \u201cI"]


def requests() -> list[Json]:
    """Of every kind: greedy and drawn, stopped, scored, with several choices, of short and long prompts."""
    kinds: list[Json] = [
        {"temperature": 0},
        {"seed": 1, "stop": ["e ", "."]},
        {"seed": 2, "n": 2, "temperature": 2},
        {"seed": 3, "logprobs": 2, "echo": True},
        {"seed": 4, "top_k": 5, "max_tokens": 15, "ignore_eos": True},
    ]
    return [
        {"prompt": p, "max_tokens": 12 + i, **kind, "stream": True} for i, p in enumerate(PROMPTS) for kind in kinds
    ]


async def post(port: int, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    writer.write(b"POST /v1/completions HTTP/1.1\r\n" + head.encode() + b"\r\n" + body)
    await writer.drain()
    return reader, writer


async def stream(port: int, asked: Json, patience: int | None = None, pause: float = 0.0) -> tuple[int, list[Text]]:
    """The status and the choices; a client without patience hangs up after so many events."""
    reader, writer = await post(port, json.dumps(asked).encode())
    status = int((await reader.readline()).split()[1])
    texts: dict[int, Text] = {}
    try:
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            for choice in json.loads(line[6:])["choices"]:
                text = texts.get(choice["index"], ("", None))[0] + choice["text"]
                texts[choice["index"]] = text, choice["finish_reason"]
            await asyncio.sleep(pause)
            if patience is not None and (patience := patience - 1) < 0:
                break
    finally:
        writer.close()
    return status, [texts[index] for index in sorted(texts)]


async def impolite(port: int, kind: int) -> None:
    """Whoever sends what no server wants."""
    reader, writer = await post(port, [b"{" * 500, b"\xff\x00", b"x" * 2_000_000, b"[1, 2"][kind % 4])
    assert (await reader.readline()).split()[1] in (b"400", b"413")
    writer.close()


async def half_sent(port: int) -> None:
    """Whoever begins a request and leaves."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-")
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.transport.abort()


def assert_begins(texts: list[Text], expected: list[Text]) -> None:
    """What came before hanging up is the beginning of the right text."""
    for (text, end), (whole, _) in zip(texts, expected, strict=False):
        assert whole == text if end else whole.startswith(text)


async def crowd(port: int, expected: list[list[Text]], seed: int) -> int:
    """How many answers were read to their ends, all of them right."""
    rng = random.Random(seed)
    kinds = [rng.randrange(len(expected)) for _ in range(CLIENTS)]
    patience = [rng.randrange(6) if i % 2 else None for i in range(CLIENTS)]
    pauses = [0.02 if i % 20 == 0 else 0.0 for i in range(CLIENTS)]  # slow readers
    asked = requests()
    texts = [stream(port, asked[k], p, pause) for k, p, pause in zip(kinds, patience, pauses, strict=True)]
    others = [impolite(port, i) for i in range(12)] + [half_sent(port) for _ in range(8)]
    answers, _ = await asyncio.gather(asyncio.gather(*texts), asyncio.gather(*others))
    finished = 0
    for kind, left, (status, found) in zip(kinds, patience, answers, strict=True):
        assert status == 200
        if left is None:
            assert found == expected[kind]
            finished += 1
        else:
            assert_begins(found, expected[kind])
    return finished


def resident(process: int) -> int:
    """Bytes of memory that a process has in use, as Linux reports it."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux reports it")
def test_a_crowd_gets_what_each_gets_alone_and_leaves_nothing() -> None:
    # In float64 no two ids are as likely as each other up to rounding, so texts can be compared as they are.
    with started("--dtype", "float64", "--queue", "500", "--positions", "4000") as (process, server):
        expected = [asyncio.run(stream(server.port, asked))[1] for asked in requests()]
        assert all(end for texts in expected for _, end in texts)
        assert len({str(texts) for texts in expected}) == len(expected)
        used = []
        for seed in range(3):
            assert asyncio.run(crowd(server.port, expected, seed)) == CLIENTS // 2
            server.wait_until(running=0, waiting=0, positions=0)
            used.append(resident(process.pid))
        # The first crowd makes it as large as it gets; what each text held, over 100 kB, would add up to 20 MB.
        assert max(used[1:]) < used[0] + 8e6, used
        assert [asyncio.run(stream(server.port, asked))[1] for asked in requests()[:5]] == expected[:5]


def test_a_crowd_too_large_is_told_to_retry() -> None:
    async def all_at_once(server: Running) -> list[tuple[int, list[Text]]]:
        return await asyncio.gather(*(stream(server.port, requests()[0]) for _ in range(30)))

    with started("--texts", "2", "--queue", "3") as (_, server):
        answers = asyncio.run(all_at_once(server))
        statuses = [status for status, _ in answers]
        assert set(statuses) == {200, 503}
        assert statuses.count(200) >= 5
        assert len({str(texts) for status, texts in answers if status == 200}) == 1
