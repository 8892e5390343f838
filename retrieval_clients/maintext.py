"""From the bytes of a page to its main text: the character set, then trafilatura.

trafilatura belongs to the extra `crawler` and is imported when it is first needed.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# The HTML standard looks for a page's own declaration in its first 1024 bytes.
_PRESCAN_BYTES = 1024
_META_CHARSET = re.compile(rb"<meta[^>]+charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class MainText:
    """What is worth reading in a page. `title` and `text` may be empty."""

    title: str
    text: str


def require_crawler_extra() -> None:
    """Imports what the extra `crawler` brings. Raises ImportError that says how to install it."""
    try:
        import protego  # noqa: F401
        import trafilatura  # noqa: F401
    except ImportError as e:
        raise ImportError(
            f'the crawler needs the package {e.name!r}: run `pip install "sglang-stream[crawler]"`',
            name=e.name,
        ) from e


def main_text(html: str) -> MainText:
    """The title and the main text of a page, without navigation, comments and the like.

    Takes tens of milliseconds of CPU time for an ordinary page: call it in a thread where an event
    loop must not wait. Raises ImportError if the extra `crawler` is not installed.
    """
    require_crawler_extra()
    import trafilatura

    tree = trafilatura.load_html(html)
    if tree is None:
        return MainText("", "")
    # Read first: the extraction changes the tree.
    title = " ".join((tree.findtext(".//title") or "").split())
    text = trafilatura.extract(tree, include_comments=False) or ""
    # No-break spaces are layout, and cost a tokenizer two or three tokens each.
    return MainText(title, text.replace("\xa0", " "))


def decode(body: bytes, charset: str | None) -> str:
    """`body` as text: its byte order mark wins, then `charset` (from HTTP), then its own <meta>.

    A declared character set is taken at its word, undecodable bytes become U+FFFD. Without one,
    or with one that Python does not know, it is UTF-8 if it can be, else windows-1252, which is
    what browsers assume.
    """
    for mark, name in _BYTE_ORDER_MARKS:
        if body.startswith(mark):
            return body.decode(name, errors="replace")
    meta = _META_CHARSET.search(body[:_PRESCAN_BYTES])
    for declared in (charset, meta and meta[1].decode("ascii", "replace")):
        if declared:
            try:
                text = body.decode(declared, errors="replace")
                text.encode()
            except (LookupError, ValueError):
                # LookupError: unknown, or no text encoding ("hex"). ValueError: one that does not
                # know how to replace ("idna"), or that lets halves of surrogate pairs through
                # ("utf-7"), which no tokenizer takes.
                continue
            return text
    try:
        return body.decode()
    except UnicodeDecodeError:
        return body.decode("windows-1252", errors="replace")
