"""Which of our modules may import which, and who may import the engine's packages.

The table is the design's. A module that no row covers is an error, and so is an import that no
cell allows, wherever it stands: at the top of a file, in a function, or for type checkers only.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sglang_stream", "router", "retrieval_clients", "experiments")
TOP_LEVEL = {*PACKAGES, "tests", "docker", "pyproject.toml", "README.md", "Makefile"}

BASICS = ("sglang_stream.errors", "sglang_stream.messages", "sglang_stream.session")

# Row -> ours that it may import besides itself. The longest matching row holds.
ARROWS: dict[str, tuple[str, ...]] = {
    "sglang_stream": ("sglang_stream.sdk", "sglang_stream.errors"),  # the public names only
    "sglang_stream.policy": (),
    "sglang_stream.errors": (),
    "sglang_stream.messages": ("sglang_stream.errors", "sglang_stream.policy.types"),
    "sglang_stream.session": ("sglang_stream.errors", "sglang_stream.messages"),
    "sglang_stream.ports": ("sglang_stream.errors",),
    "sglang_stream.config": (*BASICS, "sglang_stream.policy.types", "sglang_stream.policy.cost"),
    "sglang_stream.engine": (*BASICS, "sglang_stream.policy", "sglang_stream.config"),
    "sglang_stream.sdk": BASICS,
    "sglang_stream.prompt": BASICS,
    "sglang_stream.cli": ("sglang_stream",),
    "router": (*BASICS, "sglang_stream.prompt", "sglang_stream.config"),
    "retrieval_clients": ("sglang_stream.errors",),
    "experiments": (
        "sglang_stream.policy",
        "sglang_stream.sdk",
        "sglang_stream.config",
        "sglang_stream.errors",
        "sglang_stream.messages",
        "sglang_stream.ports",
        "retrieval_clients",
        "router.placement",
    ),
}
# The same, for imports inside a function.
LAZY_ARROWS = {"sglang_stream.cli": ("router", "experiments")}
# Whoever may import the SDK may do it by the package's public names.
PUBLIC = "sglang_stream"

ENGINE_ONLY = ("sglang", "torch")
STANDARD_LIBRARY_ONLY = ("sglang_stream.policy",)


@dataclass(frozen=True)
class Import:
    name: str  # dotted, of what is imported: a module or a name in one
    line: int
    lazy: bool  # inside a function


def within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def imports(source: str, package: str) -> Iterator[Import]:
    """Every import in `source`, a module of `package` (for relative imports)."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            above = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, lazy)
        lazy = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    yield from visit(ast.parse(source), False)


def row_of(module: str) -> str | None:
    """The row that holds for `module`; the package's own is for its `__init__` alone."""
    rows = [r for r in ARROWS if within(module, r) and (r != PUBLIC or module == PUBLIC)]
    return max(rows, key=len, default=None)


def allowed(found: Import, row: str) -> bool:
    top = found.name.partition(".")[0]
    if top in ENGINE_ONLY:
        return row == "sglang_stream.engine"
    if top not in PACKAGES:
        return row not in STANDARD_LIBRARY_ONLY or top in sys.stdlib_module_names
    cells = (*ARROWS[row], *(LAZY_ARROWS.get(row, ()) if found.lazy else ()), *own(row))
    if any(within(found.name, cell) for cell in cells):
        return True
    is_public_name = within(found.name, PUBLIC) and row_of(found.name) is None
    return is_public_name and "sglang_stream.sdk" in cells


def own(row: str) -> tuple[str, ...]:
    return () if row == PUBLIC else (row,)


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What `source`, the text of `module`, imports against the table."""
    row = row_of(module)
    if row is None:
        return [f"{module}: no row of the table covers it"]
    package = module if is_package else module.rpartition(".")[0]
    return [
        f"{module}:{found.line} may not import {found.name}"
        for found in imports(source, package)
        if not allowed(found, row)
    ]


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def test_every_import_follows_the_table() -> None:
    found = [
        violation
        for module, path in modules()
        for violation in violations(module, path.read_text(), is_package=path.stem == "__init__")
    ]
    assert found == []


def test_all_packages_are_walked() -> None:
    assert {module.partition(".")[0] for module, _ in modules()} == set(PACKAGES)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sglang_stream.policy.planner", "import numpy"),
        ("sglang_stream.policy.planner", "from sglang_stream.messages import Open"),
        ("sglang_stream.policy.planner", "def f():\n    import sglang_stream.engine.table"),
        ("sglang_stream.messages", "from sglang_stream import session"),
        ("sglang_stream.errors", "from . import messages"),
        ("sglang_stream.config", "from sglang_stream.policy.planner import plan"),
        ("sglang_stream.engine.table", "import router"),
        ("sglang_stream.engine.cpu.platform", "from ...sdk import client"),
        ("sglang_stream.sdk.client", "if TYPE_CHECKING:\n    import torch.nn"),
        ("sglang_stream.sdk.client", "from sglang_stream.config import RouterConfig"),
        ("sglang_stream.cli.serve", "from router.server import run"),
        ("sglang_stream.cli.serve", "class A:\n    import experiments"),
        ("sglang_stream.cli.serve", "def f():\n    import retrieval_clients"),
        ("sglang_stream.cli.serve", "def f():\n    import sglang.srt.server_args"),
        ("router.server", "import sglang_stream.engine"),
        ("router.server", "from sglang_stream import stream_chat"),
        ("router.server", "try:\n    import torch\nexcept ImportError:\n    pass"),
        ("retrieval_clients.crawler", "from sglang_stream import stream_chat"),
        ("experiments.demo.run", "from sglang_stream.cli.serve import serve"),
        ("experiments.demo.run", "from router.server import run"),
        ("experiments.demo.run", "from sglang_stream import engine"),
        ("sglang_stream.stray", "import os"),
    ],
)
def test_a_bad_import_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sglang_stream.policy.planner", "import heapq\nfrom .types import Plan"),
        ("sglang_stream.config", "from sglang_stream.policy.types import Policy"),
        ("sglang_stream.config", "from sglang_stream.policy.cost import Prefill"),
        ("sglang_stream.engine.hooks", "import torch\nfrom sglang.srt import utils"),
        ("sglang_stream.cli.serve", "def f():\n    from router.server import run"),
        ("sglang_stream.cli.serve", "from sglang_stream import config, engine, stream_chat"),
        ("router.server", "import transformers\nfrom sglang_stream.prompt import assemble"),
        ("retrieval_clients.crawler", "import httpx\nfrom sglang_stream.errors import StreamError"),
        ("experiments.demo.run", "from sglang_stream import stream_chat\nimport router.placement"),
    ],
)
def test_a_good_import_is_left_alone(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_an_engine_package_counts_by_its_first_name_only() -> None:
    assert violations("router.server", "import torchmetrics, sglang_router") == []


def test_top_level_names_are_fixed() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL
