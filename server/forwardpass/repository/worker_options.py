"""What a model's options come to for its queue: bounds, and how long requests may wait. Pure."""

from __future__ import annotations

import math

from forwardpass.batching.request import QueueLimits, QueueTimeout
from forwardpass.model.options import ModelConfig


def limits(config: ModelConfig, rows: int) -> QueueLimits:
    """Of the queue. `rows`: of a batch that requests share; 1 where they share none."""
    return QueueLimits(
        max_batch_rows=rows,
        rows=config.max_queue_rows,
        large_rows=max(config.max_queue_rows, 2 * config.max_request_rows),
        requests=config.max_queue_requests,
        nbytes=config.max_queue_bytes,
        delay=config.max_queue_delay_us * 1e-6 if rows > 1 else 0.0,
        preferred=tuple(config.preferred_batch_sizes),
        by_priority={p: q.max_requests for p, q in config.queue_policies.items() if q.max_requests},
        deadlines=config.deadline_scheduling and not config.preserve_ordering,
    )


def queue_timeouts(config: ModelConfig) -> dict[int, QueueTimeout] | None:
    """Of every priority, where the options set any; a priority without a policy of its own has the model's."""
    if not config.queue_policies and not config.default_timeout_us:
        return None
    found = dict.fromkeys(range(1, config.priority_levels + 1), QueueTimeout(_seconds(config.default_timeout_us)))
    for priority, policy in config.queue_policies.items():
        found[priority] = QueueTimeout(_seconds(policy.timeout_us), policy.timeout_override)
    return found


def _seconds(microseconds: int) -> float:
    """Of a timeout; 0 stands for none."""
    return microseconds * 1e-6 if microseconds else math.inf
