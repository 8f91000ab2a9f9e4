# SPDX-License-Identifier: Apache-2.0
"""What the results of both studies have in common: rows, saved as JSON that reads back, and as tables in Markdown."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ...base.tables import Tables

Result = TypeVar("Result", bound="SavedResult")


@dataclass(frozen=True)
class SavedResult(Tables):
    """Rows of figures, with the settings and the machine that they were measured with."""

    ROW: ClassVar[type]  # the class of a row
    STEM: ClassVar[str]  # the name of the files, without an ending

    rows: list[Any]
    settings: dict[str, Any]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """{"settings": ..., "machine": ..., "rows": [...]}, JSON; `from_dict` reads it back."""
        rows = [asdict(row) for row in self.rows]
        return {"settings": self.settings, "machine": self.machine, "rows": rows}

    @classmethod
    def from_dict(cls: type[Result], fields: dict[str, Any]) -> Result:
        """The result that `to_dict` wrote."""
        return cls([cls.ROW(**row) for row in fields["rows"]], fields["settings"], fields["machine"])

    def save(self, folder: str | Path) -> list[Path]:
        """Writes the JSON and the tables into `folder`, which is made if it is missing; returns the paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.STEM}.json", folder / f"{self.STEM}.md"]
        paths[0].write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        paths[1].write_text(self.to_markdown(), encoding="utf-8")
        return paths
