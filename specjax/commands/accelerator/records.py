"""Records: one JSON file in a folder for each check, figure, fact and note, written at once when it is made."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from specjax.commands.console import write_whole

SUMMARY = "summary"  # the name of the two files that are no records


@dataclasses.dataclass(frozen=True)
class Recorder:
    """Writes the records of one step.

    Attributes:
      folder: where the files go.
      step: the name of the step.
      common: what every record of this step says, such as the card.
    """

    folder: Path
    step: str
    common: dict[str, Any] = dataclasses.field(default_factory=dict)

    def write(self, kind: str, name: str, **facts: Any) -> None:
        """Writes ``STEP.NAME.json`` and prints the record, which goes to the step's log.

        Args:
          kind: "fact", "check" (with ``passed``), "figure", "note" (with ``text``), "text" or "step".
          name: differs within the step. A record of the same name is replaced.
          facts: values that JSON can hold.
        """
        record = {"step": self.step, "kind": kind, "name": name, **self.common, **facts}
        text = json.dumps(record, indent=1)
        print(text, flush=True)
        write_whole(self.folder / f"{_file_name(self.step)}.{_file_name(name)}.json", text + "\n")


def read_records(folder: Path, step: str = "*", name: str = "*") -> list[dict[str, Any]]:
    """Returns the records of a folder in the order in which they were written, of all steps or of one."""
    pattern = f"{step if step == '*' else _file_name(step)}.{name if name == '*' else _file_name(name)}.json"
    files = [file for file in folder.glob(pattern) if not file.name.startswith(".")]
    files.sort(key=lambda file: (file.stat().st_mtime_ns, file.name))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def remove_records(folder: Path, step: str) -> None:
    """Removes the records that an earlier run of a step left."""
    for file in folder.glob(f"{_file_name(step)}.*.json"):
        file.unlink()


def _file_name(name: str) -> str:
    """Returns a name in letters, digits, "-", "_" and "+". A dot separates the step from the record."""
    return re.sub(r"[^\w+-]+", "_", name)
