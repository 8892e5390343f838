from __future__ import annotations

from itertools import pairwise
from statistics import mean, median

import pytest

from experiments.bench.loads import (
    ANN,
    CRAWLER,
    LOADS,
    OPENING_TOKENS,
    QUESTION_TOKENS,
    Load,
    Request,
    pool_tokens,
    requests_of,
)
from experiments.stats import percentile


def gaps_of(requests: list[Request]) -> list[float]:
    gaps: list[float] = []
    for request in requests:
        times = [request.arrival_s, *(chunk.at_s for chunk in request.chunks)]
        gaps += [later - sooner for sooner, later in pairwise(times)]
    return gaps


@pytest.mark.parametrize("load", LOADS.values(), ids=lambda load: load.name)
def test_the_same_seed_gives_the_same_requests(load: Load) -> None:
    requests = requests_of(load, 20, 3)
    assert requests == requests_of(load, 20, 3)
    assert requests != requests_of(load, 20, 4)
    assert [request.number for request in requests] == list(range(20))


@pytest.mark.parametrize("load", LOADS.values(), ids=lambda load: load.name)
def test_requests_share_no_beginning(load: Load) -> None:
    requests = requests_of(load, 500, 0)
    assert len({request.prompt[0] for request in requests}) == 500


@pytest.mark.parametrize("load", LOADS.values(), ids=lambda load: load.name)
def test_arrivals_are_as_many_a_second_as_asked_for(load: Load) -> None:
    requests = requests_of(load, 2000, 0, rate=4.0)
    assert requests[-1].arrival_s == pytest.approx(500, rel=0.1)
    arrivals = [request.arrival_s for request in requests]
    apart = [b - a for a, b in pairwise(arrivals)]
    assert median(apart) == pytest.approx(0.25 * 0.693, rel=0.15)  # exponential, not even


@pytest.mark.parametrize("load", LOADS.values(), ids=lambda load: load.name)
def test_rate_changes_the_arrivals_only(load: Load) -> None:
    slow, fast = (requests_of(load, 20, 0, rate=rate) for rate in (1.0, 2.0))
    assert [request.prompt for request in slow] == [request.prompt for request in fast]
    assert gaps_of(slow) == pytest.approx(gaps_of(fast))


def test_the_crawler_is_shaped_as_published() -> None:
    requests = requests_of(CRAWLER, 3000, 0)
    chunks = [len(request.chunks) for request in requests]
    assert mean(chunks) == pytest.approx(7.86, rel=0.1)
    assert median(chunks) == 8
    assert (min(chunks), max(chunks)) == (1, 17)
    gaps = gaps_of(requests)
    for percent, published in ((25, 0.387), (50, 0.701), (75, 1.340), (95, 3.078)):
        assert percentile(gaps, percent) == pytest.approx(published, rel=0.1)
    tokens = [len(request.prompt) - OPENING_TOKENS - QUESTION_TOKENS for request in requests]
    for percent, published in ((50, 5749), (75, 11167), (95, 28372)):
        assert percentile(tokens, percent) == pytest.approx(published / 30, rel=0.1)
    assert max(tokens) <= CRAWLER.most_tokens + 17


def test_the_search_is_shaped_as_published() -> None:
    requests = requests_of(ANN, 3000, 0)
    updates = [len(request.chunks) for request in requests]
    assert mean(updates) == pytest.approx(4.42, rel=0.1)
    assert median(updates) == 4
    assert (min(updates), max(updates)) == (1, pytest.approx(24, abs=4))
    gaps = gaps_of(requests)
    for percent, published in ((25, 0.011), (50, 0.037), (75, 0.124)):
        assert percentile(gaps, percent) == pytest.approx(10 * published, rel=0.15)
    tokens = [len(request.prompt) - OPENING_TOKENS - QUESTION_TOKENS for request in requests]
    for percent, published in ((50, 10126), (75, 14615), (95, 30618)):
        assert percentile(tokens, percent) == pytest.approx(published / 43, rel=0.15)


def test_lists_change_and_flip_back() -> None:
    updates = flips = kept = 0
    for request in requests_of(ANN, 300, 0):
        lists = [chunk.ids for chunk in request.chunks]
        for i in range(1, len(lists)):
            updates += 1
            assert lists[i] != lists[i - 1] or lists[i] in lists[: i - 1]
            flips += i > 1 and lists[i] == lists[i - 2]
            kept += lists[i][:4] == lists[i - 1][:4]
    assert 0.1 < flips / updates < 0.3
    assert kept / updates > 0.6  # the top of a list changes less often than its end


def test_the_prompt_is_the_pages_or_the_last_list() -> None:
    crawl, search = requests_of(CRAWLER, 5, 0)[4], requests_of(ANN, 5, 0)[4]
    pages = [i for chunk in crawl.chunks for i in chunk.ids]
    assert crawl.prompt == [*crawl.opening, *pages, *crawl.question]
    assert search.prompt == [*search.opening, *search.chunks[-1].ids, *search.question]


def test_open_streams_at_their_peak_do_not_fit_the_pool() -> None:
    request = requests_of(CRAWLER, 1, 0)[0]
    assert request.open_tokens(request.arrival_s) == OPENING_TOKENS
    assert request.open_tokens(request.chunks[0].at_s) == OPENING_TOKENS + len(
        request.chunks[0].ids
    )
    assert request.open_tokens(request.last_chunk_s) == 0
    assert pool_tokens([request]) == len(request.prompt) * 5 // 4
    for load in LOADS.values():
        requests = requests_of(load, 200, 0)
        peak = max(
            sum(request.open_tokens(chunk.at_s) for request in requests)
            for other in requests
            for chunk in other.chunks
        )
        assert 3 <= peak / pool_tokens(requests) <= 4
