"""A table of a report, and how it is written."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Table:
    """`name`: of its files. The first `texts` columns are texts, the others numbers."""

    name: str
    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    texts: int = 2

    def without_empty(self) -> Table:
        """Without the columns of numbers that have none."""
        kept = [
            i
            for i in range(len(self.headings))
            if i < self.texts or any(line[i] for line in self.rows)
        ]
        return replace(
            self,
            headings=tuple(self.headings[i] for i in kept),
            rows=tuple(tuple(line[i] for i in kept) for line in self.rows),
        )

    def as_csv(self) -> str:
        file = io.StringIO()
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(self.headings)
        lines.writerows(self.rows)
        return file.getvalue()

    def as_markdown(self) -> str:
        rule = ["---" if i < self.texts else "---:" for i in range(len(self.headings))]
        lines = [self.headings, rule, *self.rows]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"### {self.title}\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")


def low_to_high(values: Sequence[float], form: str) -> str:
    """The lowest and the highest of the seeds' values, each by `form` ("{:.3f}"); empty of one."""
    if len(values) < 2:
        return ""
    return f"{form.format(min(values))} to {form.format(max(values))}"
