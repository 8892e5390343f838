from __future__ import annotations

import ast
from importlib import metadata
from pathlib import Path

import pytest

from retrieval_clients import passages as module
from retrieval_clients.passages import (
    Passage,
    PassageSettings,
    docstrings,
    installed_passages,
    split_at_paragraphs,
)
from sglang_stream.errors import InvalidRequest

SOURCE = '''
"""Of the module."""
class A:
    """Of A."""
    def f(self):
        """Of f."""
        def inner():
            """Of inner."""
async def g(): "Of g."
def undocumented(): pass
'''
SETTINGS = PassageSettings(at_least=1, min_chars=20, max_chars=60, per_package=4)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two installed packages instead of all that there are."""
    site = tmp_path / "site"
    install(site, "beta", {"beta.py": '"""' + "Both packages say this one.\n" + '"""'})
    texts = "\n\n".join(f"Paragraph number {i} of alpha's, told at length." for i in range(6))
    files = {
        "alpha/__init__.py": '"""Both packages   say this one.\n"""',
        "alpha/README.md": texts,
        "alpha/LICENSE.md": "A licence is no documentation, however long it is.",
        "alpha/tests/test_it.py": '"""Tests are for their authors, so they do not count."""',
        "alpha/bad.py": "def broken(:",
        "alpha/odd.py": '"""Half of a character is in this text: \\ud800 there."""',
    }
    install(site, "alpha", files)
    found = list(metadata.distributions(path=[str(site)]))
    monkeypatch.setattr(metadata, "distributions", lambda: iter(found))
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path / "no-stdlib"))
    return site


def install(site: Path, name: str, files: dict[str, str]) -> None:
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n\nThe description of package {name}."
    )
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))


def test_docstrings_come_with_their_dotted_names_in_the_sources_order() -> None:
    assert list(docstrings(SOURCE, "m")) == [
        ("m", "Of the module."),
        ("m.A", "Of A."),
        ("m.A.f", "Of f."),
        ("m.A.f.inner", "Of inner."),
        ("m.g", "Of g."),
    ]
    assert list(docstrings("def broken(:", "m")) == []


def test_texts_are_cut_at_paragraphs() -> None:
    text = "One, two.\n\nThree, four.\n\n\nFive, six, seven, eight.\n\nx"
    assert list(split_at_paragraphs(text, 5, 25)) == [
        "One, two.\n\nThree, four.",
        "Five, six, seven, eight.",
    ]


def test_a_long_paragraph_is_cut_at_lines_and_a_long_line_left_out() -> None:
    text = f"The first line,\nthe second line,\n{'x' * 50}\nthe last."
    assert list(split_at_paragraphs(text, 5, 34)) == [
        "The first line,\nthe second line,",
        "the last.",
    ]


def test_packages_give_distinct_passages_up_to_a_bound_each(site: Path, tmp_path: Path) -> None:
    found = installed_passages(tmp_path / "cache", SETTINGS)
    assert [p.id for p in found] == [
        "alpha==1.0:description#0",
        "alpha==1.0:alpha/README.md#0",
        "alpha==1.0:alpha/README.md#1",
        "alpha==1.0:alpha/README.md#2",
        "beta==1.0:description#0",
        "beta==1.0:beta#0",
    ]
    everything = PassageSettings(at_least=1, min_chars=20, max_chars=60)
    ids = [p.id for p in installed_passages(tmp_path / "cache", everything)]
    assert "alpha==1.0:alpha#0" in ids
    assert "beta==1.0:beta#0" not in ids
    assert not any("LICENSE" in i or "tests" in i or "odd" in i for i in ids)


def test_a_second_time_nothing_is_parsed(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = installed_passages(tmp_path / "cache", SETTINGS)
    monkeypatch.setattr(ast, "parse", lambda code: pytest.fail("a source was parsed"))
    assert installed_passages(tmp_path / "cache", SETTINGS) == first
    assert all(isinstance(p, Passage) for p in first)


def test_another_version_is_collected_anew(site: Path, tmp_path: Path) -> None:
    installed_passages(tmp_path / "cache", SETTINGS)
    meta = site / "beta-1.0.dist-info" / "METADATA"
    meta.write_text(meta.read_text().replace("Version: 1.0", "Version: 2.0"))
    assert installed_passages(tmp_path / "cache", SETTINGS)[-1].package == "beta==2.0"


def test_too_few_passages_are_an_error(site: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"give 6 passages, of 7 wanted"):
        installed_passages(
            tmp_path, PassageSettings(at_least=7, min_chars=20, max_chars=60, per_package=4)
        )
