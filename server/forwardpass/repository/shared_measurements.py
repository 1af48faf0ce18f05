"""What models of one process have in common: what was measured of one network holds for others of its shape.

Shared is what follows from the shape of a network on one machine: the rows of a batch, and how long runs take. Never
shared is what may follow from weights: whether rows are independent is proved from each model's own graph, and each
runs rows of its own. Nothing is kept between starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Final, Generic, NamedTuple, TypeVar

from forwardpass.execution.placement import Placement
from forwardpass.repository import warm_up

MOST_SHAPES: Final = 4096  # of which measurements are kept; the one that was not asked for the longest goes first

T = TypeVar("T")
Known = tuple[Mapping[Hashable, Any], Mapping[Hashable, Any], Mapping[Hashable, Any]]  # measurements by kind


class Measured(NamedTuple, Generic[T]):
    """A measurement, and the model that it was made of. `now`: this call made it."""

    value: T
    model: str
    now: bool


class OncePerShape(Generic[T]):
    """One kind of measurement. Thread-safe: threads that ask for one that is being made wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[Hashable, Measured[T]] = OrderedDict()
        self._making: dict[Hashable, threading.Lock] = {}

    def get(self, key: Hashable | None, model: str, make: Callable[[], T]) -> Measured[T]:
        """What is known of `key`, else what `make` returns for `model`, which may raise. Key None: not shared."""
        if key is None:
            return Measured(make(), model, True)
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                known = self._known.get(key)
                if known is not None:
                    self._known.move_to_end(key)
                    return known
            made = make()
            with self._lock:
                self._known[key] = Measured(made, model, False)
                self._making.pop(key, None)  # those that wait for it find it known
                if len(self._known) > MOST_SHAPES:
                    self._known.popitem(last=False)
        return Measured(made, model, True)

    def known(self) -> dict[Hashable, Measured[T]]:
        """All that was measured."""
        with self._lock:
            return dict(self._known)

    def learn(self, known: Mapping[Hashable, Measured[T]]) -> None:
        """Take over what another process measured on this machine, in the same share of it."""
        with self._lock:
            self._known.update(known)


@dataclasses.dataclass(frozen=True, slots=True)
class SharedMeasurements:
    """The measurements of a repository's models, by shape and by how they are run."""

    sizes: OncePerShape[tuple[int, str]] = dataclasses.field(default_factory=OncePerShape)  # see batch_size.choose
    exact: OncePerShape[bool] = dataclasses.field(default_factory=OncePerShape)  # whether rows had the same bits
    run_times: OncePerShape[warm_up.RunTimes] = dataclasses.field(default_factory=OncePerShape)
    _alone: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def known(self) -> Known:
        """All that was measured, for another process."""
        return self.sizes.known(), self.exact.known(), self.run_times.known()

    def learn(self, known: Known) -> None:
        """Take over what another process measured on this machine, in the same share of it."""
        sizes, exact, run_times = known
        self.sizes.learn(sizes)
        self.exact.learn(exact)
        self.run_times.learn(run_times)

    @contextlib.contextmanager
    def measuring(self, placement: Placement) -> Iterator[None]:
        """Around a load. Where runs take more than the calling thread, and so are timed by the clock: one at a time."""
        with contextlib.nullcontext() if placement.on_calling_thread else self._alone:
            yield
