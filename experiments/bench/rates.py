"""How many chunks a second one router process takes, from many streams and connections at once.

    calls of 50     one call with 50 x 200 token ids, the contents the same for all streams and
                    computed before, so that the worker finds everything cached
    single texts    one call for each text, no two the same: the router tokenises them all

The streams are opened before the clock starts. The calls of one stream follow each other.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from experiments.rows import Row
from sglang_stream.errors import EngineFailure, from_fields

CHUNK_TOKENS = 200
CHUNKS_OF_A_CALL = 50
_ID_STREAMS, _ID_CALLS = 300, 1
_TEXT_STREAMS, _TEXT_CALLS = 120, 30
_IDLE_TIMEOUT_S = 600
_COMPUTED_S = 300.0
_TOKEN_IDS = range(300, 4000)
_SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe qui ro su ta ve wi xo zu".split()
_WORDS_OF_A_TEXT = 75


@dataclass(frozen=True)
class Form:
    """A kind of load. `calls`: of one stream, of `chunks` chunks each; `goal`: chunks a second."""

    name: str
    goal: float
    streams: int
    calls: int
    chunks: int


IDS = Form("calls of 50", 5000, _ID_STREAMS, _ID_CALLS, CHUNKS_OF_A_CALL)
TEXTS = Form("single texts", 800, _TEXT_STREAMS, _TEXT_CALLS, 1)
FORMS = {form.name: form for form in (IDS, TEXTS)}


async def measure(
    url: str, rounds: int, seed: int, add: Callable[[Row], None], advance: Callable[[], None]
) -> None:
    """Gives one row for each round and form to `add`, after a round that warms up; `advance` hears
    of each. Raises what a call is refused with."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector) as http:
        ids = id_bodies(seed)
        await _compute(http, ids)
        for number in range(rounds + 1):
            for form in FORMS.values():
                loads = [
                    ids if form is IDS else text_bodies(f"{seed}/{number}/{stream}")
                    for stream in range(form.streams)
                ]
                row = {"bench": "router", "what": form.name, "round": number}
                row |= await _round(http, form, loads)
                if number > 0:
                    add(row)
                advance()


def id_bodies(seed: object) -> list[bytes]:
    """The calls of each stream of ids."""
    rng = random.Random(f"rates/{seed}")
    size = CHUNK_TOKENS * CHUNKS_OF_A_CALL
    return [
        json.dumps({"seq": seq, "input_ids": rng.choices(_TOKEN_IDS, k=size)}).encode()
        for seq in range(1, _ID_CALLS + 1)
    ]


def text_bodies(seed: object) -> list[bytes]:
    """The calls of one stream of texts, about 200 tokens each."""
    rng = random.Random(f"rates/{seed}")
    return [
        json.dumps({"seq": seq, "chunks": [random_text(rng, _WORDS_OF_A_TEXT)]}).encode()
        for seq in range(1, _TEXT_CALLS + 1)
    ]


def random_text(rng: random.Random, words: int) -> str:
    """Words of one to four syllables."""
    return " ".join("".join(rng.choices(_SYLLABLES, k=rng.randint(1, 4))) for _ in range(words))


async def _round(http: aiohttp.ClientSession, form: Form, loads: Sequence[list[bytes]]) -> Row:
    """Sends each stream its bodies, all streams at once; `tokens` are those of one chunk."""
    streams = await asyncio.gather(*(_open(http) for _ in loads))
    began = time.perf_counter()
    lengths = await asyncio.gather(
        *(_send(http, stream, bodies) for stream, bodies in zip(streams, loads, strict=True))
    )
    seconds = time.perf_counter() - began
    await asyncio.gather(*(_call(http, "DELETE", f"/v1/streams/{s}") for s in streams))
    chunks = sum(map(len, loads)) * form.chunks
    return {
        "chunks": chunks,
        "seconds": seconds,
        "chunks_per_s": chunks / seconds,
        "tokens": sum(lengths) / chunks,
    }


async def _send(http: aiohttp.ClientSession, stream: str, bodies: Sequence[bytes]) -> int:
    """The length of the stream's prompt in the end."""
    tokens = 0
    for body in bodies:
        tokens = (await _call(http, "POST", f"/v1/streams/{stream}/chunks", body))["tokens"]
    return tokens


async def _open(http: aiohttp.ClientSession) -> str:
    body = {"mode": "append", "input_ids": [], "idle_timeout_s": _IDLE_TIMEOUT_S}
    return str((await _call(http, "POST", "/v1/streams", json.dumps(body).encode()))["id"])


async def _compute(http: aiohttp.ClientSession, bodies: Sequence[bytes]) -> None:
    """Has the worker compute a stream of these calls. Raises EngineFailure if it does not."""
    stream = await _open(http)
    tokens = await _send(http, stream, bodies)
    deadline = time.monotonic() + _COMPUTED_S
    computed = 0
    while computed + CHUNK_TOKENS < tokens:
        if time.monotonic() > deadline:
            raise EngineFailure(f"{tokens} tokens were not computed in {_COMPUTED_S:g} s")
        await asyncio.sleep(0.1)
        seen = await _call(http, "GET", f"/v1/streams/{stream}")
        computed = seen["usage"]["stream"]["computed_tokens"]
    await _call(http, "DELETE", f"/v1/streams/{stream}")


async def _call(
    http: aiohttp.ClientSession, method: str, path: str, body: bytes | None = None
) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    async with http.request(method, path, data=body, headers=headers) as answer:
        content = await answer.read()
        if answer.status >= 300:
            text = content.decode(errors="replace")
            raise from_fields({"message": f"{path}: {text}"}, status=answer.status)
        return dict(json.loads(content))
