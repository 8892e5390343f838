from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_clients.traces import (
    OnBad,
    Trace,
    TraceDocument,
    TraceStep,
    anns_traces,
    crawler_traces,
    read_gaps,
    recorded_traces,
    write_trace,
)
from sglang_stream.errors import InvalidRequest

SEARCH = ("tavily_search", "Who wrote it?", 0.8, "")
COLUMNS = ("type", "query", "endTime", "content")


def write_csv(path: Path, columns: tuple[str, ...], *rows: tuple[object, ...]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as text:
        csv.writer(text).writerows([columns, *rows])
    return path


def crawl(folder: Path, *rows: tuple[object, ...], name: str = "query_0.csv") -> Path:
    return write_csv(folder / name, COLUMNS, *rows)


def page(end: object, content: str) -> tuple[object, ...]:
    return ("page_scrape", "", end, content)


def search(folder: Path, *rows: tuple[object, ...], corpus: Any = None) -> Path:
    """A query map with one query, whose trace file has these rows."""
    write_csv(folder / "res" / "0.csv", ("StartTime_us", "EndTime_us", "PipelinePool"), *rows)
    texts = {"1": "one", "2": "two", "3": "three"} if corpus is None else corpus
    (folder / "retrieved_corpus_content.part.0.json").write_text(json.dumps(texts))
    found = folder / "query_trace_map_5k.json"
    found.write_text(json.dumps({"7": {"query": "What?", "trace_file": "0.csv"}}))
    return found


def lists(trace: Trace) -> list[tuple[float, list[str]]]:
    return [(at_s, [d.id for d in documents]) for at_s, documents in trace.steps]


def test_pages_come_in_the_order_of_their_ends(tmp_path: Path) -> None:
    crawl(tmp_path, page(4.5, "later"), SEARCH, page(2.25, "sooner"))
    (trace,) = crawler_traces(tmp_path)
    assert (trace.query_id, trace.query, trace.mode) == ("query_0", "Who wrote it?", "append")
    assert [(at_s, d.text) for at_s, (d,) in trace.steps] == [(2.25, "sooner"), (4.5, "later")]
    assert len({d.id for _, (d,) in trace.steps}) == 2


def test_crawls_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 9, 0):
        crawl(tmp_path, SEARCH, page(1, "text"), name=f"query_{number}.csv")
    (tmp_path / "notes.txt").write_text("no trace")
    ids = [trace.query_id for trace in crawler_traces(tmp_path)]
    assert ids == ["query_0", "query_9", "query_10"]


def test_pages_without_content_and_queries_without_pages_are_left_out(tmp_path: Path) -> None:
    crawl(tmp_path, SEARCH, page(1, ""), page(2, " \n"), page(3, "text"))
    crawl(tmp_path, SEARCH, page(1, ""), name="query_1.csv")
    (trace,) = crawler_traces(tmp_path)
    assert [at_s for at_s, _ in trace.steps] == [3.0]


def test_a_page_may_be_longer_than_csv_reads_by_itself(tmp_path: Path) -> None:
    long = 'a "quoted" line,\n' * 20_000
    crawl(tmp_path, SEARCH, page(1, long))
    (trace,) = crawler_traces(tmp_path)
    assert trace.steps[0].documents[0].text == long


def test_other_columns_are_no_matter(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "query_0.csv",
        ("", "url", *COLUMNS),
        (0, "-", *SEARCH),
        (1, "http://a", *page(1, "text")),
    )
    (trace,) = crawler_traces(tmp_path)
    assert len(trace.steps) == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (page("soon", "x"), "endTime 'soon' is not a number"),
        (page("nan", "x"), "endTime 'nan' is not a time"),
        (page(-1, "x"), "endTime '-1' is not a time"),
        (("page_scrapes", "", 1, "x"), "type 'page_scrapes' is neither"),
        (("page_scrape", "", 1), "has not 4 fields"),
        (("page_scrape", "", 1, "x", "y"), "has not 4 fields"),
    ],
)
def test_a_bad_row_of_a_crawl_is_named_or_skipped(
    tmp_path: Path,
    row: tuple[object, ...],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = crawl(tmp_path, SEARCH, page(1, "good"), row, page(2, "also good"))
    with pytest.raises(InvalidRequest) as refused:
        list(crawler_traces(tmp_path))
    assert f"{path}, line 4: " in refused.value.message
    assert reason in refused.value.message
    assert 'on_bad = "skip"' in refused.value.message
    with caplog.at_level(logging.WARNING):
        (trace,) = crawler_traces(tmp_path, "skip")
    assert [d.text for _, (d,) in trace.steps] == ["good", "also good"]
    assert f"{path}, line 4: " in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "line 1: there is no column type"),
        (b"type,query,content\n", "line 1: there is no column endTime"),
        (b"type,query,endTime,content\npage_scrape,,1,x\n", "no row of type tavily_search"),
        (b"type,query,endTime,content\npage_scrape,,1,\xff\n", "it is no UTF-8 text"),
        (b'type,query,endTime,content\npage_scrape,,1,"x\n', "unexpected end of data"),
    ],
)
def test_a_bad_file_of_a_crawl_is_named_or_skipped(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    crawl(tmp_path, SEARCH, page(1, "good"), name="query_1.csv")
    (tmp_path / "query_0.csv").write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"query_0\.csv.*" + reason):
        list(crawler_traces(tmp_path))
    assert [trace.query_id for trace in crawler_traces(tmp_path, "skip")] == ["query_1"]


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_missing_folders_are_never_skipped(tmp_path: Path, on_bad: OnBad) -> None:
    with pytest.raises(InvalidRequest, match="no such folder"):
        list(crawler_traces(tmp_path / "gone", on_bad))
    with pytest.raises(InvalidRequest, match="no such folder"):
        list(anns_traces(tmp_path / "gone" / "map.json", on_bad))
    with pytest.raises(InvalidRequest, match=r"no query_<n>\.csv"):
        list(crawler_traces(tmp_path, on_bad))
    with pytest.raises(InvalidRequest, match=r"no retrieved_corpus_content"):
        list(anns_traces(tmp_path / "map.json", on_bad))
    (tmp_path / "retrieved_corpus_content.part.0.json").write_text('{"1": "one"}')
    with pytest.raises(InvalidRequest, match=r"map\.json: No such file"):
        list(anns_traces(tmp_path / "map.json", on_bad))


def test_lists_come_when_the_time_of_their_row_is_over(tmp_path: Path) -> None:
    found = search(tmp_path, (100, 600_100, "(1,2)"), (600_100, 2_600_100, "( 2, 3 )"))
    (trace,) = anns_traces(found)
    assert (trace.query_id, trace.query, trace.mode) == ("7", "What?", "update")
    assert lists(trace) == [(0.6, ["1", "2"]), (2.6, ["2", "3"])]
    assert trace.steps[1].documents[0].text == "two"


@pytest.mark.parametrize(
    ("pool", "ids"), [("()", []), ("(3,)", ["3"]), ("(3)", ["3"]), ("('1', '2')", ["1", "2"])]
)
def test_pools_are_tuples_as_text(tmp_path: Path, pool: str, ids: list[str]) -> None:
    (trace,) = anns_traces(search(tmp_path, (0, 1, pool), (1, 2, "(1)")))
    assert lists(trace)[0][1] == ids


def test_a_trace_file_may_lie_beside_the_map(tmp_path: Path) -> None:
    found = search(tmp_path, (0, 1, "(1)"))
    (tmp_path / "res" / "0.csv").rename(tmp_path / "0.csv")
    assert len(list(anns_traces(found))) == 1


def test_a_search_without_documents_is_left_out(tmp_path: Path) -> None:
    assert list(anns_traces(search(tmp_path, (0, 1, "()")))) == []


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (("x", 9, "(1)"), "StartTime_us 'x' is not a number"),
        ((5, "", "(1)"), "EndTime_us '' is not a number"),
        ((5, 4, "(1)"), "EndTime_us 4 is before StartTime_us 5"),
        ((0, 9, "(1)"), "StartTime_us 0 is before the row above"),
        ((5, 9, "1,2"), "PipelinePool '1,2' is not a tuple"),
        ((5, 9, "(1,,2)"), "has an empty document id"),
        ((5, 9, "(1,99)"), "document 99 is not in"),
    ],
)
def test_a_bad_row_of_a_search_is_named_or_skipped(
    tmp_path: Path, row: tuple[object, ...], reason: str
) -> None:
    found = search(tmp_path, (1, 5, "(1)"), row, (9, 10, "(2)"))
    with pytest.raises(InvalidRequest) as refused:
        list(anns_traces(found))
    assert f"{tmp_path / 'res' / '0.csv'}, line 3: " in refused.value.message
    assert reason in refused.value.message
    (trace,) = anns_traces(found, "skip")
    assert [ids for _, ids in lists(trace)] == [["1"], ["2"]]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"query": "What?"}, "query 8 has no text 'query' or no text 'trace_file'"),
        ("0.csv", "query 8 has no text 'query' or no text 'trace_file'"),
        ({"query": "What?", "trace_file": "9.csv"}, r"query 8 has the trace file 9\.csv, which"),
    ],
)
def test_a_bad_entry_of_the_map_is_named_or_skipped(
    tmp_path: Path, entry: object, reason: str
) -> None:
    found = search(tmp_path, (0, 1, "(1)"))
    found.write_text(json.dumps({"8": entry, **json.loads(found.read_text())}))
    with pytest.raises(InvalidRequest, match=reason):
        list(anns_traces(found))
    assert [trace.query_id for trace in anns_traces(found, "skip")] == ["7"]


def test_a_document_that_is_no_text_is_named_or_skipped(tmp_path: Path) -> None:
    found = search(tmp_path, (0, 1, "(1)"), corpus={"1": "one", "2": None})
    with pytest.raises(InvalidRequest, match=r"part\.0\.json: document 2 is no text"):
        list(anns_traces(found))
    assert [trace.query_id for trace in anns_traces(found, "skip")] == ["7"]


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_json_that_is_none_is_named_with_its_line(tmp_path: Path, on_bad: OnBad) -> None:
    found = search(tmp_path, (0, 1, "(1)"))
    found.write_text('{"7":\n  oops}')
    with pytest.raises(InvalidRequest, match=r"query_trace_map_5k\.json, line 2: Expecting value"):
        list(anns_traces(found, on_bad))
    found.write_text("[]")
    with pytest.raises(InvalidRequest, match="is not a JSON object"):
        list(anns_traces(found, on_bad))
    (tmp_path / "retrieved_corpus_content.part.1.json").write_text("{")
    with pytest.raises(InvalidRequest, match=r"part\.1\.json, line 1"):
        list(anns_traces(found, on_bad))


texts = st.text(st.characters(exclude_categories=["Cs"]))
documents = st.builds(TraceDocument, texts, texts)


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=4).map(sorted),
    st.lists(documents, max_size=3),
    st.sampled_from(["append", "update"]),
    texts,
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    times: list[float],
    found: list[TraceDocument],
    mode: Any,
    query: str,
) -> None:
    path = tmp_path_factory.mktemp("traces") / "new" / "traces.jsonl"
    steps = tuple(TraceStep(at_s, tuple(found)) for at_s in times)
    traces = [Trace(name, query, mode, steps) for name in ("a", "b")]
    for trace in traces:
        write_trace(path, trace)
    assert list(recorded_traces(path)) == traces


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "Input data was truncated"),
        (b'{"query_id":"a","query":"q","mode":"append"}', "missing required field `steps`"),
        (b'{"query_id":"a","query":"q","mode":"append","steps":[]}', "has no steps"),
        (
            b'{"query_id":"a","query":"q","mode":"append","steps":[[2,[]],[1,[]]]}',
            "not in the order of time",
        ),
        (b'{"query_id":"a","query":"q","mode":"add","steps":[[2,[]]]}', "Invalid enum value"),
        (b'{"query_id":"\xff"}', "invalid start byte|Invalid UTF"),
    ],
)
def test_a_bad_line_of_a_recording_is_named_or_skipped(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = tmp_path / "traces.jsonl"
    good = Trace("a", "q", "append", (TraceStep(1.0, (TraceDocument("d", "text"),)),))
    write_trace(path, good)
    with path.open("ab") as lines:
        lines.write(line + b"\n")
    write_trace(path, good)
    with pytest.raises(InvalidRequest, match=rf"traces\.jsonl, line 2: .*({reason})"):
        list(recorded_traces(path))
    assert list(recorded_traces(path, "skip")) == [good, good]


def test_a_recording_that_is_not_there_or_cannot_be_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"gone\.jsonl: No such file"):
        list(recorded_traces(tmp_path / "gone.jsonl"))
    trace = Trace("a", "q", "append", (TraceStep(1.0, ()),))
    with pytest.raises(InvalidRequest, match="Is a directory"):
        write_trace(tmp_path, trace)


def test_gaps_are_one_number_a_line(tmp_path: Path) -> None:
    path = tmp_path / "gaps.txt"
    path.write_text("0.5\n1.25e-01\n 3 \n")
    assert read_gaps(path) == [0.5, 0.125, 3.0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1\n\n2\n", "line 2: the gap '' is not a number"),
        ("1\ntwo\n", "line 2: the gap 'two' is not a number"),
        ("-1\n", "line 1: the gap '-1' is not a time"),
        ("", "is empty"),
    ],
)
def test_bad_gaps_are_named(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "gaps.txt"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=reason):
        read_gaps(path)
    with pytest.raises(InvalidRequest, match="No such file"):
        read_gaps(tmp_path / "gone.txt")
