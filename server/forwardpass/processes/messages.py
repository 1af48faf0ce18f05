"""What the supervisor and its worker processes send each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.processes.merged_samples import Parts
from forwardpass.processes.merged_statistics import Labels
from forwardpass.repository.model_folder import ModelFolder
from forwardpass.repository.model_version import ModelVersion, VersionState
from forwardpass.repository.shared_measurements import Known
from forwardpass.settings import Settings


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker process must do."""

    settings: Settings  # of its share: bounds are divided among the processes
    cores: CpuBudget
    grpc_port: int  # where the supervisor accepts
    http_port: int
    known: Known | None  # what other processes have measured
    weights: Path  # a folder for what processes map together


@dataclass(frozen=True, slots=True)
class VersionView:
    """A model version of a worker process. It has those attributes of a ModelVersion that the supervisor needs.

    `reason`: of a failure alone; reservations are in the processes' own indexes.
    """

    name: str
    version: str
    folder: Path
    state: VersionState
    reason: str
    model_folder: ModelFolder | None
    asked_for: bool
    serves: bool

    @classmethod
    def of(cls, entry: ModelVersion) -> VersionView:
        return cls(
            entry.name, entry.version, entry.folder, entry.state, entry.reason, entry.model_folder, entry.asked_for,
            entry.loaded is not None,
        )  # fmt: skip

    @property
    def loaded(self) -> VersionView | None:
        return self if self.serves else None

    @property
    def missing(self) -> bool:
        return self.asked_for and not self.serves


class State(NamedTuple):
    """Sent whenever it changes."""

    accepts: bool  # it accepts calls
    complete: bool  # every model that should serve does, or did at some time
    versions: tuple[VersionView, ...]
    skipped: tuple[tuple[str, str, str], ...]


class Report(NamedTuple):
    """What is asked of every process now and then; that it comes shows that the process does not hang.

    One may be lost, where the supervisor waits no longer: the next one has everything then.
    """

    number: int  # of the reports of one process, from 1
    samples: Parts
    statistics: Mapping[Labels, bytes | None]  # of each version that serves; None: as in the report before
