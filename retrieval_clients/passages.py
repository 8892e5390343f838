"""Real text to search in, from what is installed: docstrings, READMEs and package descriptions.

    passages = installed_passages(cache_folder)

Every installed distribution and the standard library give the docstrings of their modules, classes
and functions (read from the sources, nothing is imported), their description on the package index,
and the documents (.md, .rst) among their files, each cut at paragraphs. No two passages are alike.
The same installed versions give the same passages in the same order.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from email.message import Message
from importlib import metadata
from pathlib import Path, PurePath

import msgspec

from sglang_stream.errors import InvalidRequest

_FORMAT = 1  # of the cache: another number, other files
_LONGEST_SOURCE_BYTES = 1 << 20
_PROSE_SUFFIXES = (".md", ".rst")
_NO_PROSE = re.compile(r"licen[cs]e|copying|notice|authors|changelog|changes|history", re.I)
# Tests document themselves, for few readers; what is vendored counts for its own package.
_SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "vendored", "site-packages"}
# Half a character, which no tokenizer takes: from escapes in sources, or bytes that are not UTF-8.
_SURROGATE = re.compile("[\ud800-\udfff]")
_BLANK_LINES = re.compile(r"\n\s*\n")


class Passage(msgspec.Struct, frozen=True):
    """One to a few paragraphs. `package`: name==version; `name`: the dotted name of what the
    docstring belongs to, or the document's path; `part`: which piece of it, from 0."""

    package: str
    name: str
    part: int
    text: str

    @property
    def id(self) -> str:
        return f"{self.package}:{self.name}#{self.part}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PassageSettings:
    """Bounds of a collection.

    `at_least`: passages; with fewer it is an error. `min_chars`, `max_chars`: of a passage; shorter
    text is left out, longer text cut at paragraphs. `per_package`: passages of one package at most,
    so that a few large ones are not all there is; the standard library is one package.
    """

    at_least: int = 20_000
    min_chars: int = 200
    max_chars: int = 1000
    per_package: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.min_chars < self.max_chars or self.per_package < 1:
            raise InvalidRequest("passages need 0 < min_chars < max_chars and per_package from 1")


@dataclass(frozen=True, slots=True)
class _Source:
    """A package and where its files lie. `files`: sorted, relative to `root`."""

    package: str
    root: Path
    files: tuple[PurePath, ...]
    description: str


def installed_passages(cache: Path, settings: PassageSettings | None = None) -> list[Passage]:
    """All passages of the installed packages, by package name; read from `cache` if they are there.

    The first time takes about a minute, most of it to parse sources. Raises InvalidRequest if there
    are fewer than `at_least`.
    """
    settings = settings or PassageSettings()
    found = _installed()
    path = cache / f"passages-{_digest(found, settings)}.jsonl"
    if path.exists():
        passages = msgspec.json.Decoder(list[Passage]).decode(path.read_bytes())
    else:
        passages = list(_collect(found, settings))
        cache.mkdir(parents=True, exist_ok=True)
        write_whole(path, msgspec.json.encode(passages))
    if len(passages) < settings.at_least:
        raise InvalidRequest(
            f"the installed packages give {len(passages):,} passages, of {settings.at_least:,} "
            "wanted: install more packages, or ask for fewer"
        )
    return passages


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is there complete or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(content)
    draft.replace(path)


def _digest(found: Iterable[metadata.Distribution], settings: PassageSettings) -> str:
    """Of everything that the passages depend on, without reading them."""
    versions = [_package(distribution) for distribution in found]
    key = (_FORMAT, platform.python_version(), versions, repr(settings))
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]


def _installed() -> list[metadata.Distribution]:
    """Each distribution once, by name; one without a name is a broken installation."""
    by_name: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions():
        if name := distribution.metadata["Name"]:
            by_name.setdefault(name.lower(), distribution)
    return [by_name[name] for name in sorted(by_name)]


def _package(distribution: metadata.Distribution) -> str:
    return f"{distribution.metadata['Name']}=={distribution.version}"


def _collect(
    found: Iterable[metadata.Distribution], settings: PassageSettings
) -> Iterator[Passage]:
    """The first `per_package` passages of each package that no earlier passage is like."""
    seen: set[bytes] = set()
    for source in (_standard_library(), *map(_source, found)):
        left = settings.per_package
        for passage in _passages(source, settings):
            key = hashlib.sha256(" ".join(passage.text.split()).encode()).digest()
            if key in seen:
                continue
            seen.add(key)
            yield passage
            left -= 1
            if not left:
                break


def _standard_library() -> _Source:
    root = Path(sysconfig.get_path("stdlib"))
    files = tuple(sorted(p.relative_to(root) for p in root.rglob("*.py")))
    return _Source(f"python=={platform.python_version()}", root, files, "")


def _source(distribution: metadata.Distribution) -> _Source:
    root = Path(str(distribution.locate_file("")))
    description = distribution.metadata
    text = description.get_payload() if isinstance(description, Message) else ""
    return _Source(
        _package(distribution),
        root,
        tuple(sorted(PurePath(file) for file in distribution.files or ())),
        text if isinstance(text, str) else "",
    )


def _passages(source: _Source, settings: PassageSettings) -> Iterator[Passage]:
    # Two functions of one name (an overload, a property's setter) go on counting.
    parts: Counter[str] = Counter()
    for name, text in _texts(source):
        if _SURROGATE.search(text):
            continue
        for piece in split_at_paragraphs(text, settings.min_chars, settings.max_chars):
            yield Passage(source.package, name, parts[name], piece)
            parts[name] += 1


def _texts(source: _Source) -> Iterator[tuple[str, str]]:
    """Named texts: the description, then the documents and docstrings file by file."""
    yield "description", source.description
    for file in source.files:
        if _SKIPPED_FOLDERS.intersection(file.parts) or ".." in file.parts:
            continue
        if file.suffix == ".py":
            module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
            yield from docstrings(_read(source.root / file), module)
        elif file.suffix in _PROSE_SUFFIXES and not _NO_PROSE.search(file.name):
            yield file.as_posix(), _read(source.root / file)


def docstrings(code: str, module: str) -> Iterator[tuple[str, str]]:
    """Dotted names and docstrings in a module's source, in its order; none if it does not parse."""
    try:
        with warnings.catch_warnings():
            # Of the sources, about their own escapes.
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return
    waiting: list[tuple[str, ast.AST]] = [(module, tree)]
    while waiting:
        name, node = waiting.pop()
        is_documented = isinstance(
            node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        )
        if is_documented and (text := ast.get_docstring(node)):  # type: ignore[arg-type]
            yield name, text
        inner = [
            (f"{name}.{child.name}", child)
            for child in ast.iter_child_nodes(node)
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        waiting.extend(reversed(inner))


def split_at_paragraphs(text: str, min_chars: int, max_chars: int) -> Iterator[str]:
    """Paragraphs put together up to `max_chars`; one that is longer than that is cut at lines.

    What would be shorter than `min_chars`, or has a line longer than `max_chars`, is left out.
    """
    gathered = ""
    for piece, joint in _pieces(inspect.cleandoc(text), max_chars):
        if gathered and len(gathered) + len(joint) + len(piece) > max_chars:
            if len(gathered) >= min_chars:
                yield gathered
            gathered = piece
        else:
            gathered = f"{gathered}{joint}{piece}" if gathered else piece
    if len(gathered) >= min_chars:
        yield gathered


def _pieces(text: str, max_chars: int) -> Iterator[tuple[str, str]]:
    """Paragraphs, or the lines of one that is too long, each with what joins it to the last."""
    for paragraph in _BLANK_LINES.split(text):
        paragraph = paragraph.strip("\n").rstrip()
        if len(paragraph) <= max_chars:
            if paragraph:
                yield paragraph, "\n\n"
            continue
        joint = "\n\n"
        for line in paragraph.split("\n"):
            if len(line) <= max_chars:
                yield line.rstrip(), joint
                joint = "\n"


def _read(path: Path) -> str:
    """A file's text; "" if it is not there, is not UTF-8, or is so large that it is data."""
    try:
        if path.stat().st_size > _LONGEST_SOURCE_BYTES:
            return ""
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return ""
