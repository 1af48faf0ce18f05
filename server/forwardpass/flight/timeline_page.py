"""A dump as one HTML file: figures, a timeline to zoom into, the slowest requests. Nothing is loaded from elsewhere."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any, Final

from forwardpass.flight.dump_file import Dump, FlownBatch
from forwardpass.flight.summary import HEADER, headline, quantile, span, summaries
from forwardpass.loadtest.report import page

HERE: Final = Path(__file__).parent
# Why batches close, as a reader has it; the keys are also the names of their colours in timeline.css.
WHY: Final = {
    "alone": "ran alone at once",
    "idle": "an instance was idle",
    "full": "full",
    "preferred": "a preferred size",
    "delay": "the queue delay was over",
    "deadline": "a deadline was near",
    "queue_timeout": "a queue timeout was near",
    "ending": "the model was ending",
}
SLOWEST: Final = ("id", "model", "total", "waited", "run", "requests in its batch", "closed", "outcome")


def as_html(dump: Dump) -> str:
    """One self-contained document."""
    found = summaries(dump)
    totals = [seconds for one in found for seconds in one.total]
    waits = [seconds for one in found for seconds in one.queue]
    failed = sum([one.failed for one in found])
    refused = sum([refusal.requests for refusal in dump.refused])
    tiles = [
        (f"{len(dump.batches):,}", f"batches in {span(dump.span)}"),
        (f"{sum([one.requests for one in found]):,}", "requests in them"),
        (span(quantile(totals, 0.5)), "p50 from arrival to answer"),
        (span(quantile(totals, 0.99)), "p99"),
        (span(quantile(waits, 0.99)), "p99 of the wait"),
        (f"{failed:,}", "ran without success"),
        (f"{refused:,}", "refused or failed"),
    ]
    sections = [
        f"<style>{_text('timeline.css')}</style>",
        page.tiles("o0", tiles),
        _timeline(dump),
        page.section("The slowest requests", _slowest()),
        page.section(
            "By model",
            page.table(HEADER, [one.row() for one in found]),
            *(page.text(f"{one.name} closed: {one.reasons}") for one in found),
        ),
        page.section("How to read this", page.text(_EXPLAINED)),
        f'<script type="application/json" id="flight">{_data(dump)}</script>',
        f"<script>{_text('timeline.js')}</script>",
    ]
    return page.page("Flight recorder", headline(dump), sections)


_EXPLAINED = (
    "A line in the band of a model is one request that waits; their height is the number that wait. Below, a lane for "
    "each instance: a block is a run, coloured by why its batch was closed, followed by the thin block of its answers; "
    "a red line under it marks requests that were not answered with success, and a red mark above the band requests "
    "that were refused or failed. Point at a request or a run for its figures, click for all of its batch. The wheel "
    "zooms, dragging moves, the arrows and + and - do the same, 0 shows everything; the strip at the top has the "
    "slowest answer at each moment."
)


def _text(name: str) -> str:
    return (HERE / name).read_text("utf-8")


def _timeline(dump: Dump) -> str:
    present = {batch.closed for batch in dump.batches}
    keys = "".join(
        f'<span><i style="background:var(--{name})"></i>{escape(why)}</span>'
        for name, why in WHY.items()
        if name in present
    )
    return (
        '<div class="bar"><button id="worst">Slowest request</button><button id="all">Everything</button>'
        f'<div class="keys">{keys}<span><i style="background:var(--wait)"></i>waiting</span>'
        '<span><i style="background:var(--answer)"></i>answers</span>'
        '<span><i style="background:var(--bad)"></i>not OK</span></div></div>'
        '<div id="timeline"><canvas role="img" aria-label="Requests waiting, running and answered over time"></canvas>'
        '<div id="tip"></div></div><div id="detail"></div>'
    )


def _slowest() -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in SLOWEST)
    table = f'<table id="slowest"><thead><tr>{head}</tr></thead><tbody></tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _data(dump: Dump) -> str:
    """What timeline.js reads, as JSON that can stand in a script element. Times in microseconds."""
    models = sorted({(b.model, b.version) for b in dump.batches})
    lanes = sorted({(models.index((b.model, b.version)), b.instance) for b in dump.batches})
    closed = list(WHY)
    by_lane = {lane: place for place, lane in enumerate(lanes)}
    by_model = {model: place for place, model in enumerate(models)}
    data: dict[str, Any] = {
        "span": _us(dump.span),
        "models": [f"{model} {version}" for model, version in models],
        "lanes": lanes,
        "closed": closed,
        "why": WHY,
        "batches": [_batch(b, by_lane[by_model[b.model, b.version], b.instance], closed) for b in dump.batches],
        "refused": [[by_model.get((r.model, r.version), -1), _us(r.time), r.requests, r.reason] for r in dump.refused],
    }
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _batch(batch: FlownBatch, lane: int, closed: list[str]) -> list[Any]:
    return [
        lane, closed.index(batch.closed), _us(batch.taken), _us(batch.run), _us(batch.ended), _us(batch.done),
        batch.requests, batch.answered, batch.matrices,
        *[
            [
                _us(r.arrival), r.rows, r.request_id, _us(r.deadline) if math.isfinite(r.deadline) else None, r.outcome
            ]
            for r in batch.each
        ],
    ]  # fmt: skip


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)
