"""A server's state as lines for its log: models with their states, queues, counters. For debugging.

Its threads' stacks are not part of it: `stop` has those written without the interpreter's help.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from prometheus_client import CollectorRegistry

from forwardpass.errors import printable
from forwardpass.repository.repository import Repository

logger = logging.getLogger(__name__)


def log_state(repository: Repository, registry: CollectorRegistry) -> None:
    """Log `dump`, a line for each of its lines."""
    for line in dump(repository, registry):
        logger.warning("state: %s", line)


def dump(repository: Repository, registry: CollectorRegistry) -> Iterator[str]:
    """Yield every model version and skipped folder, then every metric that is not 0, without histogram buckets."""
    for entry in repository.entries():
        reason = f": {printable(entry.reason, 300)}" if entry.reason else ""
        yield f"model {printable(entry.name)} version {entry.version or '-'} is {entry.phase}{reason}"
    for name, version, why in repository.skipped():
        yield f"folder {printable(f'{name}/{version}')} is skipped: {printable(why, 300)}"
    for metric in registry.collect():
        for sample in metric.samples:
            if sample.value and not sample.name.endswith(("_bucket", "_created")):
                labels = ",".join(f"{key}={printable(value)}" for key, value in sample.labels.items() if value)
                yield f"{sample.name}{{{labels}}} {sample.value:g}"
