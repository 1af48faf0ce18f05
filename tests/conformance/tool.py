"""A foreign program and how it is run."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

SECONDS = 300.0


@dataclass(frozen=True)
class Tool:
    """A foreign program. `run` gives what it printed, and fails the test where its exit status is not 0."""

    path: Path
    libraries: tuple[Path, ...] = ()  # folders of shared libraries that the system does not have

    def run(self, *words: str | Path, check: bool = True) -> str:
        found = os.environ.get("LD_LIBRARY_PATH", "")
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": ":".join([*map(str, self.libraries), *([found] if found else [])]),
        }
        # Loopback: no proxy, whatever the environment says.
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            environment.pop(name, None)
            environment.pop(name.upper(), None)
        done = subprocess.run(
            [str(self.path), *map(str, words)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS, env=environment,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{self.path.name} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout
