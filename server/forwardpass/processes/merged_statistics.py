"""ModelStatistics of several processes as those of one server, and RepositoryIndex likewise. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from forwardpass import protocol

Labels = tuple[str, str]  # of a model version

_DURATIONS: Final = (
    "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss"
)  # fmt: skip
_OF_BATCH: Final = ("compute_input", "compute_infer", "compute_output")


def added(one: Any, other: Any) -> Any:
    """The inference.ModelStatistics of two processes together: counts and times as sums, the later last request."""
    total = protocol.ModelStatistics()
    total.CopyFrom(one)
    total.last_inference = max(one.last_inference, other.last_inference)
    total.inference_count += other.inference_count
    total.execution_count += other.execution_count
    for name in _DURATIONS:
        _add(getattr(total.inference_stats, name), getattr(other.inference_stats, name))
    batches = {entry.batch_size: entry for entry in total.batch_stats}
    for entry in other.batch_stats:
        known = batches.get(entry.batch_size)
        if known is None:
            total.batch_stats.add().CopyFrom(entry)
            continue
        for name in _OF_BATCH:
            _add(getattr(known, name), getattr(entry, name))
    sizes = sorted(total.batch_stats, key=lambda entry: entry.batch_size)
    copies = [type(entry).FromString(entry.SerializeToString()) for entry in sizes]
    del total.batch_stats[:]
    total.batch_stats.extend(copies)
    return total


def _add(duration: Any, more: Any) -> None:
    duration.SetInParent()
    duration.count += more.count
    duration.ns += more.ns


class MergedStatistics:
    """The statistics of all processes, those that have ended included, by model version."""

    def __init__(self) -> None:
        self._live: dict[int, dict[Labels, bytes]] = {}
        self._ended: dict[Labels, Any] = {}

    def take(self, process: int, found: Mapping[Labels, bytes | None]) -> None:
        """What a process reports of every version it serves; None: as the last time."""
        known = self._live.get(process, {})
        self._live[process] = {
            labels: message if message is not None else known[labels] for labels, message in found.items()
        }

    def end(self, process: int) -> None:
        for labels, message in self._live.pop(process, {}).items():
            ended = protocol.ModelStatistics.FromString(message)
            before = self._ended.get(labels)
            self._ended[labels] = ended if before is None else added(before, ended)

    def served(self) -> list[Labels]:
        """The versions that any process serves, by name and number."""
        found = {labels for of_process in self._live.values() for labels in of_process}
        return sorted(found, key=lambda labels: (labels[0], int(labels[1] or 0)))

    def of(self, labels: Labels) -> Any:
        """The statistics of one version."""
        messages = [of_process[labels] for of_process in self._live.values() if labels in of_process]
        found = [protocol.ModelStatistics.FromString(message) for message in messages]
        if labels in self._ended:
            found.append(self._ended[labels])
        return _sum(found)


def _sum(found: Iterable[Any]) -> Any:
    total: Any = None
    for statistics in found:
        total = statistics if total is None else added(total, statistics)
    return total
