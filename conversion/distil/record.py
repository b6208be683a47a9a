# Copyright 2026 the mc-transformers authors.
"""What a run has measured so far, in one JSON file that is written after every stage."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from ...hub.files import write_file


class Record:
    """Results and seconds of stages that are over: a stage that the file knows is not run again.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = json.loads(path.read_text()) if path.exists() else {"seconds": {}, "cpu_seconds": {}}

    def stage(self, name: str, make: Callable[[], object]) -> object:
        """The result of `make`, which JSON must be able to hold, now or from an earlier call."""
        if name not in self.values:
            start, cpu = time.perf_counter(), time.process_time()
            value = json.loads(json.dumps(make()))
            spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
            if isinstance(value, dict):  # what went on after a kill knows better
                spent |= {key: value.pop(key) for key in spent if key in value}
            self.values[name] = value
            for key, number in spent.items():
                self.values[key][name] = number
            self.write()
        return self.values[name]

    def write(self, **values: object) -> None:
        """Add values, and write the file."""
        self.values |= values
        write_file(self.path, json.dumps(self.values, indent=2) + "\n")

    @property
    def spent(self) -> float:
        """Seconds of all stages."""
        return sum(self.values["seconds"].values())
