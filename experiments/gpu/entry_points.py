"""Makes this checkout an installed distribution, in a folder for PYTHONPATH, without pip: SGLang
finds its plugins by the entry points of distributions."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def main(folder: Path) -> None:
    project = msgspec.toml.decode(PROJECT.read_bytes())["project"]
    name, version = project["name"], project["version"]
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = (
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
        for group, points in project["entry-points"].items()
    )
    (info / "entry_points.txt").write_text("\n".join(groups))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
