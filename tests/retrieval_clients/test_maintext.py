from __future__ import annotations

import subprocess
import sys

import pytest

from retrieval_clients import MainText, main_text
from retrieval_clients.maintext import decode


def test_the_package_does_not_load_what_only_the_extra_brings() -> None:
    code = (
        "import sys, retrieval_clients; "
        "print([m for m in ('trafilatura', 'protego', 'lxml') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


def test_title_and_text() -> None:
    head = "<head><title> Two\n words </title></head>"
    html = f"<html>{head}<body><p>Some&nbsp;text.</p></body></html>"
    assert main_text(html) == MainText("Two words", "Some text.")


@pytest.mark.parametrize("html", ["", "no markup", "<html></html>", "\0", "<<<>>>", "<!--"])
def test_nothing_to_read(html: str) -> None:
    assert main_text(html) == MainText("", "")


@pytest.mark.parametrize(
    ("body", "charset", "text"),
    [
        ("naïve".encode(), None, "naïve"),
        ("naïve".encode("latin-1"), None, "naïve"),
        ("naïve".encode("latin-1"), "latin-1", "naïve"),
        ("“x”".encode("windows-1252"), None, "“x”"),
        # The header before the page's own word, the byte order mark before both.
        ("<meta charset=koi8-r>ё".encode("cp1251"), "windows-1251", "<meta charset=koi8-r>ё"),
        ("\ufeff<meta charset=koi8-r>ё".encode(), "latin-1", "<meta charset=koi8-r>ё"),
        ("ё".encode("utf-16"), "latin-1", "ё"),
        (
            '<META name=x Charset="koi8-r">ё'.encode("koi8-r"),
            None,
            '<META name=x Charset="koi8-r">ё',
        ),
        (
            '<meta http-equiv=a content="text/html; charset=koi8-r">ё'.encode("koi8-r"),
            None,
            '<meta http-equiv=a content="text/html; charset=koi8-r">ё',
        ),
        # Names that Python has no text encoding for.
        ("ё".encode(), "nonsense", "ё"),
        ("ё".encode(), "hex", "ё"),
        ("ё".encode(), "idna", "ё"),
        ("ё".encode(), "a\0b", "ё"),
        (b"+2AA-", "utf-7", "+2AA-"),
        (b"a\xff", "utf-8", "a\ufffd"),
        (b"", None, ""),
    ],
)
def test_character_sets(body: bytes, charset: str | None, text: str) -> None:
    assert decode(body, charset) == text
