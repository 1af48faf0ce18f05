"""The sessions of one model version: one that all instances share, or one for each instance on each device.

The first is opened to inspect the network; afterwards the others are opened, and all are prepared for serving.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import ConfigError
from forwardpass.execution import shared_arena
from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.execution.ort_session import set_memory
from forwardpass.execution.placement import CPU, Placement
from forwardpass.execution.providers import OpenSession, open_session
from forwardpass.execution.reshaped_session import ReshapedSession
from forwardpass.execution.session import Runnable, Session
from forwardpass.model.example_inputs import example
from forwardpass.model.options import ModelConfig
from forwardpass.model.signature import ModelSignature
from forwardpass.repository.batch_invariance import ROWS
from forwardpass.settings import Settings

LARGE_RUN = 4e-3  # seconds of a full batch, from which a model gets an instance for each core
INLINE, INLINE_ON_ONE_CORE = 0.5e-3, 2e-3  # longest run, in seconds, made by the thread that received its requests


class SessionPool:
    """A context manager around the loading of a model: if that fails, the sessions are closed."""

    def __init__(
        self,
        path: Path,
        placement: Placement,
        config: ModelConfig,
        name: str,
        opens: OpenSession = open_session,
        opening: Callable[[Any], None] = lambda _: None,
    ) -> None:
        """Open the first session. `name`: of the threads; `opening`: see OpenSession. Raises ModelError."""
        self._path = path
        self._placement = placement
        self._config = config
        self._name = name
        self._opens = opens
        self._opening = opening
        self._all: list[Session] = []
        self._reshaped: ModelSignature | None = None
        self._open(placement.on(placement.device) if placement.devices else placement)

    def __enter__(self) -> SessionPool:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is not None:
            for session in self._all:
                session.close()

    def _open(self, where: Placement) -> None:
        name = f"{self._name}#{len(self._all)}"
        session = self._opens(self._path, where, self._config.graph_optimizations, name, self._prepared)
        self._all.append(session if self._reshaped is None else ReshapedSession(session, self._reshaped))

    def _prepared(self, options: Any) -> None:
        """Complete the ONNX Runtime session options of a session about to be opened."""
        config = self._config
        set_memory(options, config.memory_arena, config.memory_pattern)
        # One that gives its memory back after every run would do so with others'.
        if self._placement.provider == CPU and config.memory_arena and not config.shrink_memory_arena:
            shared_arena.use(options)
        self._opening(options)

    def reshape(self, signature: ModelSignature) -> None:
        """Run all sessions with arrays of the shapes in `signature`, if any differs from the network's."""
        if any(t.network_shape is not None for t in (*signature.inputs, *signature.outputs)):
            self._reshaped = signature
            self._all[:] = [ReshapedSession(session, signature) for session in self._all]

    @property
    def first(self) -> Runnable:
        return self._all[0]

    @property
    def serving(self) -> Sequence[Session]:
        """The sessions for a worker."""
        return self._all

    def prepare(
        self,
        each: int,
        signature: ModelSignature,
        rows: int,
        *,
        pads: bool,
        samples: Sequence[NDArray[Any]] | None,
        half: bool,
        check_stop: Callable[[], None] = lambda: None,
    ) -> str:
        """Open `each` sessions per device, if on devices, and prepare all for batches of up to `rows` rows.

        Returns how batches will be run, in words. `samples`: real rows per input, if known. `pads`, `half`: see
        Session.prepare. Raises ModelError or DeviceLost. `check_stop` is called before each session, and may raise.
        """
        devices = self._placement.devices
        for place in range(1, each * len(devices)):
            check_stop()
            self._open(self._placement.on(devices[place % len(devices)]))
        rng = np.random.default_rng(0)
        rows_of = samples or [example(tensor, ROWS, rng) for tensor in signature.inputs if signature.batchable]
        said: dict[str, None] = {}
        for session in self._all:
            if signature.batchable:
                check_stop()
                session.prepare(rows, pads, rows_of, half)
            said[session.how or "plain runs, without fixed buffers or CUDA graphs, since axis 0 is no batch"] = None
        return "; ".join(said)


def inline_run_limit(settings: Settings, cores: CpuBudget) -> float:
    """The longest run, in seconds, that the thread that received its requests makes itself.

    With several cores another thread can compute beside the one that reads, at the cost of a hand-over; on one core the
    two would only interrupt each other. There the limit bounds how long arrivals and disconnects go unnoticed.
    """
    if settings.inline_run_limit is not None:
        return settings.inline_run_limit
    return INLINE_ON_ONE_CORE if cores.count == 1 else INLINE


def count(
    config: ModelConfig, settings: Settings, cores: CpuBudget, placement: Placement, run: float
) -> tuple[int, str]:
    """The number of instances (per device, if on devices), and the reason. `run`: seconds of a full batch.

    For a small network the transport is the bottleneck: one instance, run by the receiving thread, is fastest. A large
    one gets an instance for each core. Raises ConfigError.
    """
    told = config.instances or settings.instances
    if config.preserve_ordering:
        if len(placement.devices) > 1:
            raise ConfigError(
                f"{config.where('preserve_ordering')}: expected one device with it, got {placement.label}: runs on "
                "several end in any order"
            )
        return 1, "one instance, so that the order of arrival is kept"
    if placement.devices:
        each = " on each device" if len(placement.devices) > 1 else ""
        return told or 1, f"{told} instance(s){each} as configured" if told else f"one instance{each}"
    if told:
        return told, f"{told} instance(s) as configured"
    if run < LARGE_RUN or placement.threads > 1 or cores.count == 1:
        return 1, "one instance outruns the transport"
    return cores.count, f"an instance for each core, since a full batch takes {run * 1e3:.1f} ms"
