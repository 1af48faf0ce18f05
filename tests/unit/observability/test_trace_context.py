"""Which requests are traced: parents decide, and roots by ratio, as the SDK's own samplers would have it."""

from __future__ import annotations

import logging
import random

import pytest

from forwardpass.observability.trace_context import SAMPLERS, Sampled, Sampler, parse_traceparent, sampler_of

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def header(flags: str = "01", trace: str = TRACE) -> str:
    return f"00-{trace}-{SPAN}-{flags}"


FOLLOWED = Sampled(int(TRACE, 16), int(SPAN, 16))


@pytest.mark.parametrize("ratio", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("flags", ["00", "01", "02", "03", "ff", "fe"])
def test_a_parent_decides(ratio: float, flags: str) -> None:
    decided = Sampler(ratio).decide(header(flags))
    assert decided == (FOLLOWED if int(flags, 16) & 1 else None)


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize(
    "traceparent", ["", "nonsense", header("00", "0" * 32), header("01", "0" * 32), header() + "-x"]
)
def test_without_one_a_share_is_traced(ratio: float, traceparent: str) -> None:
    sampler = Sampler(ratio, draw=random.Random(1).random)
    found = [made for _ in range(5_000) if (made := sampler.decide(traceparent)) is not None]
    assert len(found) == ratio * 5_000 if ratio in (0.0, 1.0) else abs(len(found) / 5_000 - ratio) < 0.03
    assert len({made.trace_id for made in found}) == len(found)
    # Whoever decides again by the same ratio decides alike.
    assert all(made.parent_id == 0 and made.trace_id & ((1 << 64) - 1) < ratio * (1 << 64) for made in found)


@pytest.mark.parametrize("flags", ["00", "01"])
def test_ratios_may_decide_whatever_the_parent_did(flags: str) -> None:
    low, high = "00000000000000ff", "ff00000000000000"
    sampler = Sampler(0.5, parent_based=False)
    assert sampler.decide(header(flags, "1" * 16 + low)) == Sampled(int("1" * 16 + low, 16), int(SPAN, 16))
    assert sampler.decide(header(flags, "1" * 16 + high)) is None


def test_the_sdk_decides_alike() -> None:
    trace = pytest.importorskip("opentelemetry.trace", reason="needs the extra otel")
    sampling = pytest.importorskip("opentelemetry.sdk.trace.sampling", reason="needs the extra otel")
    draw = random.Random(2)
    for name in SAMPLERS:
        ours = sampler_of({"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": "0.5"})
        root = {"on": sampling.ALWAYS_ON, "off": sampling.ALWAYS_OFF}.get(name.rpartition("_")[2])
        root = root or sampling.TraceIdRatioBased(0.5)
        theirs = sampling.ParentBased(root) if name.startswith("parent") else root
        for _ in range(200):
            trace_id, flags = draw.getrandbits(128), draw.getrandbits(1)
            context = trace.SpanContext(trace_id, int(SPAN, 16), True, trace.TraceFlags(flags))
            above = trace.set_span_in_context(trace.NonRecordingSpan(context))
            expected = theirs.should_sample(above, trace_id, "x").decision.is_sampled()
            decided = ours.decide(header(f"{flags:02x}", f"{trace_id:032x}"))
            assert decided == (Sampled(trace_id, int(SPAN, 16)) if expected else None), name


@pytest.mark.parametrize(
    ("given", "ratio", "parent_based", "warns"),
    [
        ({}, 1.0, True, False),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, 0.0, False, False),
        ({"OTEL_TRACES_SAMPLER": "parentbased_always_off", "OTEL_TRACES_SAMPLER_ARG": "1"}, 0.0, True, False),
        ({"OTEL_TRACES_SAMPLER": "traceidratio"}, 1.0, False, False),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.01"}, 0.01, True, False),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "2"}, 1.0, False, True),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "nan"}, 1.0, False, True),
        ({"OTEL_TRACES_SAMPLER": "xray", "OTEL_TRACES_SAMPLER_ARG": "0"}, 1.0, True, True),
    ],
)
def test_the_standard_variables(
    given: dict[str, str], ratio: float, parent_based: bool, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = sampler_of(given)
    assert (sampler.ratio, sampler.parent_based) == (ratio, parent_based)
    assert bool([r for r in caplog.records if r.levelno == logging.WARNING]) == warns


def test_later_versions_may_have_more() -> None:
    later = parse_traceparent(header().replace("00-", "cc-", 1) + "-more")
    assert later is not None and (later.trace_id, later.span_id, later.sampled) == (TRACE, SPAN, True)
    assert parse_traceparent(header() + "-more") is None
