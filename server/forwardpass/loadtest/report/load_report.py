"""Measurements as a page with plots, as JSON and as CSV. Pure: returns text.

One measurement of each server is shown in detail: the one that confirmed an objective, else the highest load. Its
distributions come from the client; batch sizes and queue times from the server's own metrics over the same time.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from forwardpass import __version__
from forwardpass.loadtest.generator import histogram
from forwardpass.loadtest.measurement import LAG_SHARE, QUANTILES, Measurement, ms
from forwardpass.loadtest.objective_search import Knee
from forwardpass.loadtest.report import charts, page
from forwardpass.loadtest.report.charts import Guide, Series

_CURVES = ((0.5, "p50", "dots"), (0.99, "p99", ""), (0.999, "p99.9", "dash"))
_CELLS = 48  # of a heat strip, from the lowest latency to the highest


def as_json(points: Sequence[Measurement], knees: Sequence[Knee]) -> str:
    found: dict[str, Any] = {"forwardpass": __version__, "measurements": [point.as_json() for point in points]}
    if knees:
        found["objectives"] = [
            {
                "target": knee.confirmed.offer.target,
                "objective": str(knee.objective),
                "rate": knee.rate,
                "confidence_95": [knee.low, knee.high],
                "estimates": list(knee.estimates),
                "confirmed_rate": knee.confirmed.offer.rate,
                "client_limited": knee.client_limited,
            }
            for knee in knees
        ]
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def as_csv(points: Sequence[Measurement]) -> str:
    """One line per measurement; latencies in milliseconds."""
    names = [f"p{100 * q:g}_ms" for q in QUANTILES]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = (
        "target,model,loop,offered_per_second,in_flight,seconds,rows,requests,ok_per_second,in_time_per_second,failed"
    )
    writer.writerow([*header.split(","), *names, "max_ms", "lag_p99_ms", "client_busy", "client_saturated"])
    for point in points:
        offer = point.offer
        load = [offer.rate or "", offer.in_flight or "", offer.seconds, offer.mean_rows]
        counts = [point.requests, f"{point.throughput:.3f}", f"{point.goodput:.3f}", point.recording.failed]
        latencies = [_milli(point.quantile(q)) for q in (*QUANTILES, 1.0)]
        client = [_milli(point.lag(0.99)), f"{point.busy:.3f}", int(bool(point.saturation))]
        loop = "open" if offer.open_loop else "closed"
        writer.writerow([offer.target, offer.model, loop, *load, *counts, *latencies, *client])
    return out.getvalue()


def _milli(seconds: float) -> str:
    return f"{seconds * 1e3:.5g}" if math.isfinite(seconds) else ""


def as_html(points: Sequence[Measurement], knees: Sequence[Knee]) -> str:
    """One self-contained document."""
    names = list(dict.fromkeys(point.offer.target for point in points))
    groups = [[point for point in points if point.offer.target == name] for name in names]
    looked_at = [_chosen(group, knees) for group in groups]
    first = looked_at[0].offer
    under = f"{_loop(first)}; {first.mean_rows:g} row(s) a request; latency counts from when a request was due"
    sections = [_head(looked_at, knees)]
    loads = page.plots(_latency(groups, knees), _throughput(groups))
    sections.append(page.section("Against the offered load", loads))
    sections.append(
        page.section(
            "In detail",
            *(
                page.text(f"{point.offer.target}: {_offered(point)} for {point.offer.seconds:g} s")
                for point in looked_at
            ),
            page.plots(_cdf(looked_at), *(_strip(point, place) for place, point in enumerate(looked_at))),
        )
    )
    sections.append(page.section("Inside the server", *_server(looked_at)))
    sections.append(page.section("Every measurement", _table(points)))
    sections.append(page.section("How to read this", page.text(_EXPLAINED)))
    return page.page(f"Load test: {first.model} on {' and '.join(names)}", under, sections)


_EXPLAINED = (
    "In an open loop requests are sent on a schedule, whatever has been answered, so a server that stalls is "
    "charged for everything that was due meanwhile; a closed loop waits for it and hides that. Percentiles are of "
    "answers with status OK; an objective counts failed requests as infinitely late. The client counts as "
    f"saturated when 1 % of its requests left late by more than {LAG_SHARE:.0%} of the p99 that it measured, or "
    "when it was busy all the time: its figures are then its own rather than the server's. Latencies are exact to "
    "within 0.4 %."
)


def _chosen(points: Sequence[Measurement], knees: Sequence[Knee]) -> Measurement:
    target = points[0].offer.target
    for knee in knees:
        if knee.confirmed.offer.target == target:
            return knee.confirmed
    return max(points, key=lambda point: point.offer.rate or point.throughput)


def _loop(offer: Any) -> str:
    return f"open loop, {offer.arrivals} arrivals" if offer.open_loop else "closed loop"


def _offered(point: Measurement) -> str:
    offer = point.offer
    return f"{offer.rate:,.0f} requests/s" if offer.open_loop else f"{offer.in_flight} requests in flight"


def _head(looked_at: Sequence[Measurement], knees: Sequence[Knee]) -> str:
    parts = []
    for place, point in enumerate(looked_at):
        values = [(f"{point.throughput:,.0f}/s", "OK answers"), (f"{point.errors:.2%}", "failed")]
        values += [(ms(point.quantile(q)), f"p{100 * q:g}") for q in (0.5, 0.99, 0.999)]
        knee = next((k for k in knees if k.confirmed is point), None)
        if knee is not None:
            bound = "at least " if knee.client_limited else ""
            values.insert(0, (f"{bound}{knee.rate:,.0f}/s", f"{knee.objective} ({knee.low:,.0f} to {knee.high:,.0f})"))
        parts += [page.text(f"{point.offer.target}, at {_offered(point)}"), page.tiles(f"o{place}", values)]
        parts += [page.warning(f"Client saturated: {why}") for why in point.saturation]
        parts += [page.warning(f"{outcome}, for example: {text}") for outcome, text in point.examples.items()]
    return "".join(parts)


def _latency(groups: Sequence[Sequence[Measurement]], knees: Sequence[Knee]) -> str:
    series = []
    for place, group in enumerate(groups):
        for q, word, style in _CURVES:
            name = f"{group[0].offer.target} {word}" if len(groups) > 1 else word
            series.append(Series(name, _curve(group, q), f"s{place} {style}"))
    values = [y for one in series for _, y in one.points]
    guides = [Guide(knee.objective.seconds, str(knee.objective)) for knee in knees[:1]]
    for knee in knees:
        guides += [Guide(knee.low, "", True, knee.high), Guide(knee.rate, f"{knee.rate:,.0f}/s", True)]
    x = charts.linear("offered, requests/s", [x for one in series for x, _ in one.points], charts.number)
    y = charts.logarithmic("latency", [*values, *(g.value for g in guides if not g.vertical)], charts.duration)
    return charts.lines("Latency against offered load", x, y, series, guides, "latency")


def _curve(group: Sequence[Measurement], q: float) -> list[tuple[float, float]]:
    """A quantile by offered rate; measurements within 2 % of one rate form one point, their median."""
    found: list[tuple[float, float]] = []
    together: list[Measurement] = []
    for point in [*sorted(group, key=_load), None]:
        if together and (point is None or _load(point) > 1.02 * _load(together[0])):
            values = [p.quantile(q) for p in together if p.recording.ok]
            if values:
                found.append((_load(together[0]), float(np.median(values))))
            together = []
        if point is not None:
            together.append(point)
    return found


def _load(point: Measurement) -> float:
    """The offered rate; in a closed loop, the throughput."""
    return point.offer.rate or point.throughput


def _throughput(groups: Sequence[Sequence[Measurement]]) -> str:
    series = []
    for place, group in enumerate(groups):
        ordered = sorted(group, key=_load)
        label = f"{group[0].offer.target} " if len(groups) > 1 else ""
        series.append(Series(f"{label}answered OK", [(_load(p), p.throughput) for p in ordered], f"s{place}"))
        if ordered[0].offer.deadline is not None:
            series.append(Series(f"{label}in time", [(_load(p), p.goodput) for p in ordered], f"s{place} dash"))
    most = max(x for one in series for x, _ in one.points)
    series.append(Series("all that was offered", [(0, 0), (most, most)], "soft dots", marks=False))
    x = charts.linear("offered, requests/s", [most], charts.number)
    y = charts.linear("requests/s", [y for one in series for _, y in one.points], charts.number)
    return charts.lines("Throughput against offered load", x, y, series, (), "throughput")


def _cdf(looked_at: Sequence[Measurement]) -> str:
    """Latency by percentile, on an axis stretched towards the slowest: 90, 99, 99.9 % are equally far apart."""
    series = []
    for place, point in enumerate(looked_at):
        counts = point.recording.total_latency
        total = counts.sum()
        if total:
            below = np.cumsum(counts) / total
            places = np.flatnonzero(counts)
            left = np.maximum(1.0 - below[places], 0.5 / total)
            points = [(1 / a, b) for a, b in zip(left.tolist(), histogram.MIDDLES[places].tolist(), strict=True)]
            series.append(Series(point.offer.target, _thin(points), f"s{place}", marks=False))
    most = max([x for one in series for x, _ in one.points], default=100.0)
    ticks = [(10.0**n, f"{100 - 100 * 10.0**-n:g} %") for n in range(math.floor(math.log10(max(most, 10))) + 1)]
    x = charts.Axis("share of the answers", 1.0, max(most, 10.0), ticks, log=True)
    y = charts.logarithmic("answered within", [y for one in series for _, y in one.points], charts.duration)
    return charts.lines("Latency distribution", x, y, series, (), "cdf")


def _thin(points: Sequence[tuple[float, float]], most: int = 300) -> list[tuple[float, float]]:
    step = max(1, len(points) // most)
    return [*points[::step], *points[-1:]]


def _strip(point: Measurement, place: int) -> str:
    """Latencies over time, darker for more responses, with the p50 and p99 of each slice."""
    latency = point.recording.latency
    seen = np.flatnonzero(latency.sum(axis=0))
    title = f"{point.offer.target}: latency over time"
    slice_ = point.offer.seconds / point.recording.slices
    ticks = charts.linear("", [point.offer.seconds]).ticks
    x = charts.Axis("seconds", 0.0, point.offer.seconds, [t for t in ticks if t[0] <= point.offer.seconds])
    if not len(seen):
        return charts.heat(title, x, charts.logarithmic("latency", [], charts.duration), [], [], f"s{place}")
    y = charts.logarithmic("latency", [histogram.MIDDLES[seen[0]], histogram.MIDDLES[seen[-1]]], charts.duration)
    edges = np.geomspace(y.low, y.high, _CELLS + 1)
    rows = np.clip(np.searchsorted(edges, histogram.MIDDLES) - 1, 0, _CELLS - 1)
    grid = np.zeros((point.recording.slices, _CELLS))
    for bucket in seen:
        grid[:, rows[bucket]] += latency[:, bucket]
    most = math.log1p(grid.max())
    cells = [
        (i * slice_, (i + 1) * slice_, edges[j], edges[j + 1], 0.12 + 0.78 * math.log1p(grid[i, j]) / most)
        for i, j in zip(*np.nonzero(grid), strict=True)
    ]
    over = []
    for q, word, style in ((0.5, "p50", "ink dots"), (0.99, "p99", "ink")):
        values = [((i + 0.5) * slice_, histogram.quantile(counts, q)) for i, counts in enumerate(latency)]
        over.append(Series(word, values, style, marks=False))
    return charts.heat(title, x, y, cells, over, f"s{place}")


def _server(looked_at: Sequence[Measurement]) -> list[str]:
    told = [(place, point) for place, point in enumerate(looked_at) if point.server]
    if not told:
        return [page.text("The server's metrics could not be read; --metrics takes their address.")]
    parts = []
    figures = [
        _bars("Rows in a batch", "rows, up to", "batch_rows", told, charts.number),
        _bars("Time in the queue", "up to", "queue_seconds", told, charts.duration),
    ]
    if any(figures):
        parts.append(page.plots(*(figure for figure in figures if figure)))
    rows = []
    for _, point in told:
        server = point.server or {}
        means = [_mean(server["batch_rows"], lambda v: f"{v:.1f}"), _mean(server["queue_seconds"], charts.duration)]
        means.append(_mean({"mean": server["stages"].get("run")}, charts.duration))
        refused = ", ".join(f"{reason} {count:,.0f}" for reason, count in server["refused"].items()) or "none"
        rows.append([point.offer.target, f"{server['requests']:,.0f}", f"{server['batches']:,.0f}", *means, refused])
    header = ["", "requests", "batches", "rows a batch", "mean queue time", "mean run time", "refused"]
    return [*parts, page.table(header, rows)]


def _mean(told: Any, form: Any) -> str:
    return "-" if told["mean"] is None else str(form(told["mean"]))


def _bars(title: str, label: str, key: str, told: Sequence[tuple[int, Measurement]], form: Any) -> str:
    """A histogram from the servers' metrics, with their own bounds; empty if no server has one."""
    found = [(place, point, (point.server or {})[key].get("buckets", [])) for place, point in told]
    found = [(place, point, buckets) for place, point, buckets in found if sum(count for _, count in buckets)]
    if not found:
        return ""
    bounds = sorted({math.inf if b is None else b for _, _, buckets in found for b, count in buckets if count})
    every = sorted({math.inf if b is None else b for _, _, buckets in found for b, _ in buckets})
    shown = [b for b in every if bounds[0] <= b <= bounds[-1]]
    series = []
    for place, point, buckets in found:
        total = sum(count for _, count in buckets)
        by = {math.inf if b is None else b: count / total for b, count in buckets}
        series.append((point.offer.target, f"s{place}", [by.get(b, 0.0) for b in shown]))
    labels = ["more" if math.isinf(b) else form(b) for b in shown]
    return charts.bars(title, label, labels, series, key)


def _table(points: Sequence[Measurement]) -> str:
    header = ["server", "load", "OK/s", "failed", "p50", "p99", "p99.9", "max", "client's lag p99", "client busy", ""]
    rows = [
        [point.offer.target, _offered(point), f"{point.throughput:,.0f}", f"{point.errors:.2%}"]
        + [ms(point.quantile(q)) for q in (0.5, 0.99, 0.999, 1.0)]
        + [ms(point.lag(0.99)), f"{point.busy:.0%}", "client saturated" if point.saturation else ""]
        for point in points
    ]
    return page.table(header, rows)
