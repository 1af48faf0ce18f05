"""The W3C's traceparent header, and which requests are traced by the standard samplers. Pure.

https://www.w3.org/TR/trace-context/ and OpenTelemetry's OTEL_TRACES_SAMPLER.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

logger = logging.getLogger(__name__)

_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_ODD: Final = frozenset("13579bdf")
_LOW: Final = (1 << 64) - 1  # the half of a trace's id that samplers by ratio look at
SAMPLERS: Final = tuple(
    prefix + name for prefix in ("parentbased_", "") for name in ("always_on", "always_off", "traceidratio")
)


class Parent(NamedTuple):
    """The span that a request was made in."""

    trace_id: str  # 32 hexadecimal digits
    span_id: str  # 16
    sampled: bool


class Sampled(NamedTuple):
    """A request that is traced."""

    trace_id: int
    parent_id: int  # the caller's span; 0: it begins the trace


def parse_traceparent(header: str) -> Parent | None:
    """The parent in a traceparent header; None if it is not one."""
    found = _TRACEPARENT.fullmatch(header)
    if found is None or (found[5] is not None and found[1] == "00"):
        return None
    return Parent(found[2], found[3], int(found[4], 16) & 1 == 1)


class Sampler:
    """Decides as the SDK's samplers do, for a request that is not sampled in a fraction of their time."""

    def __init__(
        self, ratio: float, *, parent_based: bool = True, draw: Callable[[int], int] = random.getrandbits
    ) -> None:
        """`ratio`: the share of traces. `parent_based`: a parent decides instead. `draw(bits)` returns random bits."""
        self.ratio = ratio
        self.parent_based = parent_based
        self._bound = round(ratio * (_LOW + 1))
        self._draw = draw

    def decide(self, traceparent: str) -> Sampled | None:
        """What a request with this header is traced as; None: it is not."""
        low = self._draw(64)
        drawn = low < self._bound
        if not drawn and (not traceparent or (self.parent_based and traceparent[54:55] not in _ODD)):
            return None
        parent = parse_traceparent(traceparent)
        if parent is None:  # the beginning of a trace: its id is such that others with this ratio decide alike
            return Sampled((self._draw(64) << 64) | low or 1, 0) if drawn else None
        trace_id = int(parent.trace_id, 16)
        if parent.sampled if self.parent_based else trace_id & _LOW < self._bound:
            return Sampled(trace_id, int(parent.span_id, 16))
        return None


def sampler_of(environ: Mapping[str, str]) -> Sampler:
    """The sampler that OTEL_TRACES_SAMPLER and _ARG ask for; with a warning the default, if they are not valid."""
    name = environ.get("OTEL_TRACES_SAMPLER", "").strip().lower() or SAMPLERS[0]
    if name not in SAMPLERS:
        logger.warning("OTEL_TRACES_SAMPLER: expected one of %s, got %r; taking %s", SAMPLERS, name, SAMPLERS[0])
        name = SAMPLERS[0]
    kind = name.removeprefix("parentbased_")
    ratio = {"always_on": 1.0, "always_off": 0.0}.get(kind)
    if ratio is None:
        given = environ.get("OTEL_TRACES_SAMPLER_ARG", "").strip()
        try:
            ratio = float(given or 1.0)
            if not 0.0 <= ratio <= 1.0:
                raise ValueError(given)
        except ValueError:
            logger.warning("OTEL_TRACES_SAMPLER_ARG: expected a number from 0 to 1, got %r; taking 1", given)
            ratio = 1.0
    return Sampler(ratio, parent_based=kind != name)
