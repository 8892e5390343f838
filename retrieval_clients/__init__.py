"""Retrieval clients: async iterators whose results can be streamed into a prompt as they arrive."""

from retrieval_clients.adapters import langchain_chunks, llama_index_chunks, model_chunks
from retrieval_clients.anns import Hit, SearchSettings, TopK, build_index, progressive_search
from retrieval_clients.crawler import Crawl, Page, PageError, crawl
from retrieval_clients.embeddings import embed_corpus
from retrieval_clients.maintext import MainText, main_text
from retrieval_clients.passages import Passage, installed_passages
from retrieval_clients.recorder import record, replay
from retrieval_clients.search import Found, Searxng, Tavily, find_pages
from retrieval_clients.traces import Trace, recorded_traces
from retrieval_clients.web import CrawlSettings

__all__ = [
    "Crawl",
    "CrawlSettings",
    "Found",
    "Hit",
    "MainText",
    "Page",
    "PageError",
    "Passage",
    "SearchSettings",
    "Searxng",
    "Tavily",
    "TopK",
    "Trace",
    "build_index",
    "crawl",
    "embed_corpus",
    "find_pages",
    "installed_passages",
    "langchain_chunks",
    "llama_index_chunks",
    "main_text",
    "model_chunks",
    "progressive_search",
    "record",
    "recorded_traces",
    "replay",
]
