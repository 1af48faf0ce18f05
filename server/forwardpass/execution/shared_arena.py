"""One arena for the runs of all networks on the CPU. A session's own would keep what its largest batch once took.

A run's memory is needed while it runs, so a process needs as much as it has runs at the same time, not as it has
models; and memory that another model has just used is in the cache. Weights lie outside of it, and go with their
session. What the arena has and nobody uses stays in it, for the next run of any model, until `shrink`.
`set_limit` bounds what it has, and weights with it.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, Final

import numpy as np

from forwardpass.execution.onnx_runtime import ort
from forwardpass.execution.ort_session import new_run_options, session_options
from forwardpass.execution.placement import CPU, Placement

logger = logging.getLogger(__name__)

# Grows by what is asked for: to double it each time would suit one network that grows.
ARENA: Final = {"arena_extend_strategy": 1, "initial_chunk_size_bytes": 1 << 20, "max_dead_bytes_per_chunk": -1}
# An ONNX file of one node, y = Identity(x), FP32 [1]: a session to run when the arena must shrink, which only runs do.
_TENSOR: Final = b"\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01"
_NODE: Final = b"\x0a\x01x\x12\x01y\x22\x08Identity"
_GRAPH: Final = (
    b"\x0a" + bytes([len(_NODE)]) + _NODE + b"\x12\x01g"
    + b"\x5a" + bytes([len(_TENSOR) + 3]) + b"\x0a\x01x" + _TENSOR
    + b"\x62" + bytes([len(_TENSOR) + 3]) + b"\x0a\x01y" + _TENSOR
)  # fmt: skip
IDENTITY: Final = b"\x08\x08\x3a" + bytes([len(_GRAPH)]) + _GRAPH + b"\x42\x04\x0a\x00\x10\x0d"

_lock = threading.Lock()
_limit = 0
_session: Any = None
_is_missing = False


def set_limit(nbytes: int) -> None:
    """Bound what all runs in the arena, and weights, may take together; 0: no bound. Call before the first `use`.

    A run that would exceed it fails with the figures, before the memory is taken. ONNX Runtime subtracts the weights
    from the bound for runs, without looking whether they are more: then it bounds nothing. See `check_weights`.
    """
    global _limit
    _limit = nbytes


def check_weights(nbytes: int) -> None:
    """Log a warning where loaded networks take so much that runs are not bounded."""
    if _limit and nbytes > _limit:
        logger.warning(
            "loaded networks take %d bytes, --cpu-memory is %d: what runs take is not bounded beside them",
            nbytes,
            _limit,
        )


def use(options: Any) -> None:
    """Let a session that is opened with these options run in the shared arena; in its own, where there is none."""
    if _opened() is not None:
        _add(options)


def shrink() -> None:
    """Give memory back that no run uses now. The next runs take it from the system again, which costs them a little."""
    session = _session
    if session is not None:
        session.run(None, {"x": np.zeros(1, np.float32)}, new_run_options(shrink_arena=True))


def _add(options: Any) -> None:
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")


def _opened() -> Any:
    """The session for `shrink`, opened with the arena by the first call; None: this ONNX Runtime cannot share one."""
    global _session, _is_missing
    with _lock:
        if _session is None and not _is_missing:
            try:
                where = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
                ort.create_and_register_allocator(
                    where, ort.OrtArenaCfg(ARENA | ({"max_mem": _limit} if _limit else {}))
                )
                options = session_options(Placement(CPU, 0, 1, ""), "none")
                _add(options)
                _session = ort.InferenceSession(IDENTITY, options, providers=[CPU])
            except Exception as error:
                _is_missing = True
                logger.warning("every network has an arena of its own: %s", error)
        return _session
