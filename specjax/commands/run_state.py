"""What a run decided or measured, in a file of its folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specjax.commands.console import write_whole


class RunState:
    """Values by name in ``state.json`` of a run's folder. So a run that goes on is the same run.

    Args:
      folder: the run's. It must exist when something is kept.

    Raises:
      ValueError: the file is damaged.
    """

    def __init__(self, folder: Path):
        self.folder, self._file = folder, folder / "state.json"
        self._values: dict[str, Any] = {}
        if self._file.is_file():
            try:
                self._values = json.loads(self._file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{self._file} is not JSON ({error}); remove {folder} to start anew") from None

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str, default: Any) -> Any:
        """Returns the value of a name, or the default if it is not there."""
        return self._values.get(name, default)

    def once(self, name: str, decide: Callable[[], Any]) -> Any:
        """Returns the value of a name. It is decided and kept unless it is there."""
        if name not in self._values:
            self._keep(name, decide())
        return self._values[name]

    def add(self, name: str, number: float) -> None:
        """Adds to a number that begins as 0."""
        self._keep(name, self.get(name, 0.0) + number)

    def _keep(self, name: str, value: Any) -> None:
        self._values[name] = value
        write_whole(self._file, json.dumps(self._values))
