"""What a worker takes: prompts, calls, swaps and decode steps, measured on the running engine.

The worker tells the seconds of its own forwards and copies (`forwards`, `swap_outs`, `swap_ins` of
its state), so neither HTTP nor queues are in them; decode steps are seen by the client, and so are
calls, by way of a router.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing
from statistics import median
from typing import Any

import httpx
from httpx_sse import aconnect_sse

from experiments.direct import DirectHttp, DirectWorker
from experiments.rows import Row
from sglang_stream.errors import EngineFailure

Add = Callable[[Row], None]
Advance = Callable[[], None]

REQUESTS = (1, 4, 8)
_STEPS = 24
_CONTEXTS = 2
_PREFIXES = (1 / 16, 1 / 4, 3 / 4)  # of the limit
_TOKEN_IDS = range(300, 4000)
_SMALLEST = 16
_SWAP_SIZES = 6
_SPARE_PAGES = 8  # that a request needs beyond its prompt
_IDLE_TIMEOUT_S = 3600.0
_CALLS = {0.0: 10, 0.1: 5, 0.3: 5, 1.0: 3, 3.0: 3}  # of a repeat, by the seconds of rest before
_CALL_TOKENS = 128
_POLL_S = 0.005
_DEADLINE_S = 600.0


def prompt_sizes(limit: int) -> list[int]:
    """Of new tokens: from few to `limit`, each four times the one before."""
    sizes = [limit]
    while sizes[0] >= 4 * _SMALLEST:
        sizes.insert(0, sizes[0] // 4)
    return sizes


def prefix_sizes(limit: int, page: int) -> list[int]:
    """Of cached tokens, in whole pages."""
    sizes = [int(share * limit) // page * page for share in _PREFIXES]
    return sorted({size for size in sizes if size > 0})


def swap_sizes(limit: int, page: int) -> list[int]:
    """Of swapped streams, in whole pages: up to `limit`, each twice the one before."""
    sizes = [(limit >> n) // page * page for n in reversed(range(_SWAP_SIZES))]
    return [size for size in sizes if size >= 2 * _SPARE_PAGES * page]


def least_limit(page: int) -> int:
    """The smallest limit with which there are swaps of enough sizes to fit."""
    return 2 * _SPARE_PAGES * page << 3


def context_sizes(limit: int) -> list[int]:
    """Of one request's context, for decode."""
    return [max(1, limit // 64), max(2, limit // 8)]


def count_cells(limit: int, page: int) -> int:
    """How many measurements a repeat has, those of swaps aside."""
    prefixes = prefix_sizes(limit, page)
    fits = sum(prefix + new <= limit for prefix in (0, *prefixes) for new in prompt_sizes(limit))
    return len(prefixes) + fits + sum(_CALLS.values()) + len(REQUESTS) * _CONTEXTS


class MeasuredWorker(DirectWorker):
    """A worker and what is new in its figures."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.url = url
        self._told: dict[str, set[tuple[float, ...]]] = {}

    def row(self) -> Row:
        """What it is. `kv_bytes_per_token`: over all devices."""
        server = self._call("GET", "/server_info")
        state = server["internal_states"][0]["sglang_stream"]
        return {
            "what": "worker",
            "dtype": server["dtype"],
            "page_size": self.page_size,
            "kv_tokens": server["max_total_num_tokens"],
            "kv_bytes_per_token": state["kv_bytes_per_token"] * server["tp_size"],
        }

    def compute(self, prompt: Sequence[int]) -> None:
        """One ordinary request for one token."""
        params = {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True}
        self._call("POST", "/generate", {"input_ids": prompt, "sampling_params": params})

    def new(self, figures: str) -> list[tuple[float, ...]]:
        """What has joined `figures` since the last call. No two have the same seconds."""
        server = self._call("GET", "/server_info")
        told = [tuple(f) for f in server["internal_states"][0]["sglang_stream"][figures]]
        before = self._told.get(figures, set())
        self._told[figures] = set(told)
        return [figure for figure in told if figure not in before]

    def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Over a new connection: the server closes one that has been idle for some seconds."""
        with closing(DirectHttp(self.url)) as http:
            return http.call(method, path, body)

    def wait_for(self, reached: Callable[[], bool], what: str) -> None:
        """Asks again and again. Raises EngineFailure with `what` if it never comes true."""
        deadline = time.monotonic() + _DEADLINE_S
        while not reached():
            if time.monotonic() > deadline:
                raise EngineFailure(f"{what} has not happened in {_DEADLINE_S:g} s")
            time.sleep(_POLL_S)


# --- prefill --------------------------------------------------------------------------------------


def measure_prefill(
    worker: MeasuredWorker, limit: int, repeats: int, seed: int, add: Add, advance: Advance
) -> None:
    """Rows of `new` and `cached` tokens, `limit` together at most.

    A prefix is cached by a request of its own, each upon the one before. SGLang may cut a long
    prompt into several forwards (`--chunked-prefill-size`): each is a row. Raises EngineFailure if
    the worker computes anything else.
    """
    rng = random.Random(f"prefill/{seed}")
    _computed(worker, _tokens(rng, limit), 0)  # the first forwards after a start take longer
    for repeat in range(repeats):
        longest = _tokens(rng, limit)
        before = 0
        for prefix in (0, *prefix_sizes(limit, worker.page_size)):
            if prefix:
                _add_forwards(add, _computed(worker, longest[:prefix], before), repeat)
                advance()
            for new in prompt_sizes(limit):
                if prefix + new <= limit:
                    prompt = [*longest[:prefix], *_tokens(rng, new)]
                    _add_forwards(add, _computed(worker, prompt, prefix), repeat)
                    advance()
            before = prefix


def _add_forwards(add: Add, forwards: Sequence[tuple[float, ...]], repeat: int) -> None:
    for new, cached, seconds in forwards:
        add({"what": "prefill", "new": new, "cached": cached, "seconds": seconds, "repeat": repeat})


def _computed(
    worker: MeasuredWorker, prompt: Sequence[int], cached: int
) -> list[tuple[float, ...]]:
    """The forwards of a prompt of which `cached` tokens are cached."""
    worker.new("forwards")
    worker.compute(prompt)
    return _forwards(worker, len(prompt) - cached)


def _forwards(worker: MeasuredWorker, expected: int) -> list[tuple[float, ...]]:
    """The forwards of the request that was just answered, which computed `expected` tokens."""
    found: list[tuple[float, ...]] = []

    def complete() -> bool:
        found.extend(worker.new("forwards"))
        return sum(new for new, _, _ in found) >= expected - worker.page_size

    worker.wait_for(complete, f"the computing of {expected} tokens")
    computed = sum(new for new, _, _ in found)
    if computed > expected + worker.page_size:
        raise EngineFailure(
            f"{computed:.0f} tokens were computed where {expected} were to be: measure on a "
            "worker with its prefix cache on that nobody else uses"
        )
    return found


# --- calls ----------------------------------------------------------------------------------------


def measure_calls(
    router_url: str, worker: MeasuredWorker, repeats: int, seed: int, add: Add, advance: Advance
) -> None:
    """Rows of requests of one token that come after a rest of `rested_s`: the seconds of the
    `forward`, and those beyond it, there, through the router, and back."""
    rng = random.Random(f"calls/{seed}")
    rests = [rested_s for rested_s, count in _CALLS.items() for _ in range(count)]
    with closing(DirectHttp(router_url)) as router:
        for repeat, rested_s in itertools.product(range(repeats), rests):
            prompt = _tokens(rng, _CALL_TOKENS)
            body = {"model": "default", "prompt": prompt, "max_tokens": 1, "temperature": 0}
            worker.new("forwards")
            time.sleep(rested_s)
            began = time.perf_counter()
            router.call("POST", "/v1/completions", body)
            took = time.perf_counter() - began
            forward = sum(seconds for _, _, seconds in _forwards(worker, len(prompt)))
            row = {"what": "call", "rested_s": rested_s, "forward": forward, "repeat": repeat}
            add({**row, "seconds": took - forward})
            advance()


# --- swaps ----------------------------------------------------------------------------------------


def pool_for_swaps(limit: int, page: int) -> int:
    """Tokens of a KV pool that one stream of `limit` tokens nearly fills."""
    return -(-(limit + max(limit // 4, 64 * page)) // page) * page


def measure_swaps(
    worker: MeasuredWorker, limit: int, repeats: int, seed: int, add: Add, advance: Advance
) -> None:
    """Rows of `tokens` that were copied out and back, of streams of about `size` tokens.

    The pool is filled with open streams of one size. Ordinary requests take all that is left and
    the KV of the last stream, whose next chunk brings it back. Needs a worker with `--preemption
    swap`, host memory for `limit` tokens and a small pool (`pool_for_swaps`). Raises EngineFailure
    if a stream is not swapped.
    """
    rng = random.Random(f"swaps/{seed}")
    page = worker.page_size
    pool = int(worker.row()["kv_tokens"])
    margin = (repeats + 8) * page  # the last stream grows by a page with each repeat
    for size in swap_sizes(limit, page):
        count = (pool - margin) // size
        streams = [f"st-{uuid.uuid4().hex}" for _ in range(count)]
        for stream in streams:
            worker.open(stream, _IDLE_TIMEOUT_S)
            worker.append(stream, 1, _tokens(rng, size))
            _wait_until_held(worker, stream, size)
        last = streams[-1]
        for repeat in range(repeats):
            worker.new("swap_outs")
            worker.new("swap_ins")
            left = pool - (count - 1) * size - _SPARE_PAGES * page
            for part in _parts(left, limit):
                worker.compute(_tokens(rng, part))
            _add_swap(worker, "swap_out", size, repeat, add)
            worker.append(last, repeat + 2, _tokens(rng, page))
            _wait_until_held(worker, last, size + (repeat + 1) * page)
            _add_swap(worker, "swap_in", size, repeat, add)
            advance()
        for stream in streams:
            worker.abort(stream)


def _parts(tokens: int, limit: int) -> list[int]:
    """Prompts of at most `limit` tokens, the first one as long as can be: it is what pushes."""
    return [limit] * (tokens // limit) + [tokens % limit] * (tokens % limit > 0)


def _wait_until_held(worker: MeasuredWorker, stream: str, tokens: int) -> None:
    worker.wait_for(
        lambda: worker.status(stream).held >= tokens,
        f"the computing of a stream of {tokens} tokens",
    )


def _add_swap(worker: MeasuredWorker, what: str, size: int, repeat: int, add: Add) -> None:
    swaps = worker.new(f"{what}s")
    if len(swaps) != 1:
        raise EngineFailure(
            f"one {what} was expected and {len(swaps)} were made: host memory is too small for "
            "the longest stream, or the worker's KV pool cannot be copied"
        )
    [(tokens, seconds)] = swaps
    add({"what": what, "size": size, "tokens": tokens, "seconds": seconds, "repeat": repeat})


# --- decode ---------------------------------------------------------------------------------------


async def measure_decode(
    url: str, limit: int, repeats: int, seed: int, add: Add, advance: Advance
) -> None:
    """Rows of concurrent `requests`, the tokens of their `context` together in the middle of the
    measured steps, and the median seconds between two tokens."""
    rng = random.Random(f"decode/{seed}")
    async with httpx.AsyncClient(base_url=url, timeout=_DEADLINE_S) as http:
        for each in context_sizes(limit):
            prompts = [_tokens(rng, each) for _ in range(max(REQUESTS))]
            for prompt in prompts:  # cached, so that all of them decode together soon
                await _token_times(http, prompt, 1)
            for repeat, count in itertools.product(range(repeats), REQUESTS):
                times = await asyncio.gather(
                    *(_token_times(http, prompt, _STEPS) for prompt in prompts[:count])
                )
                row = {"what": "decode", "requests": count, "context": count * (each + _STEPS // 2)}
                add({**row, "seconds": step_s(times), "repeat": repeat})
                advance()


async def _token_times(
    http: httpx.AsyncClient, prompt: Sequence[int], max_tokens: int
) -> list[float]:
    """When each event of an answer came."""
    params = {"max_new_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": params, "stream": True}
    async with aconnect_sse(http, "POST", "/generate", json=body) as events:
        return [time.perf_counter() async for event in events.aiter_sse() if event.data != "[DONE]"]


def step_s(times: Sequence[Sequence[float]]) -> float:
    """The median time between two tokens of a request, while all requests decode.

    `times`: of each request, when its tokens came. Raises EngineFailure if they never decode
    together.
    """
    begin, end = max(t[0] for t in times), min(t[-1] for t in times)
    gaps = [b - a for t in times for a, b in itertools.pairwise(t) if begin <= a and b <= end]
    if not gaps:
        raise EngineFailure(f"{len(times)} requests were not decoded together")
    return median(gaps)


def _tokens(rng: random.Random, count: int) -> list[int]:
    return rng.choices(_TOKEN_IDS, k=count)
