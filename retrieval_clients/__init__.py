"""Retrieval clients: async iterators whose results can be streamed into a prompt as they arrive."""

from retrieval_clients.crawler import Crawl, Page, PageError, crawl
from retrieval_clients.maintext import MainText, main_text
from retrieval_clients.recorder import record, replay
from retrieval_clients.traces import Trace, recorded_traces
from retrieval_clients.web import CrawlSettings

__all__ = [
    "Crawl",
    "CrawlSettings",
    "MainText",
    "Page",
    "PageError",
    "Trace",
    "crawl",
    "main_text",
    "record",
    "recorded_traces",
    "replay",
]
