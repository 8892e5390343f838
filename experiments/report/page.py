"""One HTML page that needs nothing besides itself."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

import jinja2
import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from experiments.report.against_engine import Machines
from experiments.report.figures import Drawing
from experiments.report.load import Rows
from experiments.report.measures import Setting
from experiments.report.table import Table
from experiments.rows import Row, machine_of

_DPI = 150
_SALT = "sglang-stream"


class Section(NamedTuple):
    """What there is of cells that are compared with each other. `where`: the machines, as a
    sentence; `short`: as a part of one; `sources`: of `LoadRow`."""

    title: str
    where: str
    short: str
    sources: tuple[str, ...]
    tables: Sequence[Table]
    drawings: Sequence[Drawing] = ()


def section_of(setting: Setting, tables: Sequence[Table], drawings: Sequence[Drawing]) -> Section:
    """The section of a setting."""
    how = "Measured on" if setting.source == "engine" else "Simulated on"
    placed = f"; placement: {setting.placement}" if setting.placement else ""
    return Section(
        setting.workload,
        f"{how} {setting.machine}{placed}",
        ", ".join(part for part in (setting.machine, setting.placement) if part),
        (setting.source,),
        tables,
        drawings,
    )


def section_of_both(machines: Machines, table: Table) -> Section:
    """The section of the simulator against the engine."""
    return Section(
        f"{machines.workload}: the simulator against the engine",
        f"Simulated on {machines.simulated}, measured on {machines.measured}",
        f"{machines.simulated} against {machines.measured}",
        ("simulator", "engine"),
        [table],
    )


def page(
    sections: Sequence[Section], costs: Sequence[Drawing], rows: Rows, notes: Sequence[str]
) -> str:
    """The page, `notes` at its beginning; the same rows give the same bytes."""
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string((files("experiments.report") / "page.html.j2").read_text())
    return template.render(
        sections=[
            section._asdict() | {"drawings": [_inline(drawing) for drawing in section.drawings]}
            for section in sections
        ],
        costs=[_inline(drawing) for drawing in costs],
        manifests=[_described(row) for row in rows.manifests],
        notes=notes,
    )


def as_svg(figure: Figure) -> bytes:
    """The same figure gives the same bytes."""
    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": _SALT, "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def as_png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    return file.getvalue()


def _inline(drawing: Drawing) -> dict[str, Markup | str]:
    """An SVG as a part of the page; ids are its own, since a page has many."""
    svg = as_svg(drawing.figure).decode()
    svg = svg[svg.index("<svg") :]
    own = re.sub(r"\W", "-", drawing.caption)
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{own}-", svg)
    return {"caption": drawing.caption, "svg": Markup(svg)}


def _described(manifest: Row) -> dict[str, str]:
    versions = {k: v for k, v in (manifest.get("versions") or {}).items() if v}
    spec = manifest.get("spec") or {}
    fields = {
        "specification": spec.get("name"),
        "at": manifest.get("at"),
        "model": manifest.get("model"),
        "machine": manifest.get("machine") or machine_of(manifest),
        "run on": machine_of(manifest),
        "flags": " ".join(manifest.get("flags") or ()),
        "seed": manifest.get("seed"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "python": manifest.get("python"),
        "commit": manifest.get("commit"),
        "workload": _pairs(spec.get("workload") or {}),
        "engine": _pairs(spec.get("engine") or {}),
    }
    return {name: str(value) for name, value in fields.items() if value not in (None, "")}


def _pairs(fields: Row) -> str:
    return ", ".join(f"{k} {v}" for k, v in fields.items() if v not in (None, [], "", ()))
