"""Ordinary chat completions on workers apart: through our router and through SGLang's, in turn.

Both routers stand before the same prefill and decode workers. No two prompts are the same; all have
the same number of words. Who comes first changes from pair to pair.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from importlib import util
from typing import Any, Literal

from experiments.bench.rates import random_text
from experiments.direct import DirectHttp
from experiments.rows import Row
from experiments.server import SglangWorker
from sglang_stream.errors import EngineFailure

By = Literal["router", "sglang-router"]

WORDS = 40
ANSWER_TOKENS = 16
_WARMING = 2


def has_sglang_router() -> bool:
    """Whether SGLang's router is installed, which only this comparison needs."""
    return util.find_spec("sglang_router") is not None


def workers_of(router_url: str) -> list[SglangWorker]:
    """The workers that our router has, as SGLang's wants to be told of them."""
    with closing(DirectHttp(router_url)) as router:
        listed = router.call("GET", "/workers")["workers"]
    return [_worker(worker["url"], worker["role"]) for worker in listed]


def _worker(url: str, role: str) -> SglangWorker:
    if role != "prefill":
        return SglangWorker(url, None)
    with closing(DirectHttp(url)) as worker:
        return SglangWorker(
            url, worker.call("GET", "/server_info")["disaggregation_bootstrap_port"]
        )


def measure(
    urls: dict[By, str],
    pairs: int,
    seed: int,
    add: Callable[[Row], None],
    advance: Callable[[], None],
) -> None:
    """Gives one row for each answer to `add`; `advance` hears of each pair.

    Raises what a call is refused with, EngineFailure for an answer of another length.
    """
    rng = random.Random(f"chat/{seed}")
    with ExitStack() as stack:
        routers = {by: stack.enter_context(closing(DirectHttp(url))) for by, url in urls.items()}
        order = list(routers)
        for pair in range(-_WARMING, pairs):
            for by in order:
                seconds = _chat_s(routers[by], random_text(rng, WORDS))
                if pair >= 0:
                    row = {"bench": "router", "what": "chat", "pair": pair, "by": by}
                    add(row | {"seconds": seconds})
            order.reverse()
            advance()


def _chat_s(router: DirectHttp, question: str) -> float:
    """Seconds until the whole answer is there."""
    body: dict[str, Any] = {
        "model": "default",
        "messages": [
            {"role": "system", "content": "Answer in one sentence."},
            {"role": "user", "content": question},
        ],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    began = time.perf_counter()
    answer = router.call("POST", "/v1/chat/completions", body)
    seconds = time.perf_counter() - began
    if answer["usage"]["completion_tokens"] != ANSWER_TOKENS:
        raise EngineFailure(f"an answer of {answer['usage']['completion_tokens']} tokens")
    return seconds
