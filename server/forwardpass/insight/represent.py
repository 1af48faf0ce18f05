"""`forwardpass represent`: separability of the classes in the input and after each layer, in numbers and pictures."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.client.arrays import TensorInfo
from forwardpass.console import array_files
from forwardpass.console.tables import table
from forwardpass.errors import InsightError
from forwardpass.insight import equation_check, figures, model_argument, ort_profile
from forwardpass.insight.separability import FOLDS, Separability, check_classes, measure
from forwardpass.model.onnx_graph import Graph, build, read

_SHOWN_ROWS = 1500  # maximum dots in a picture; the figures use all rows
_PANEL = 250  # side of a panel of the page, in pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model_argument.add_arguments(parser)
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="rows the network was not trained on: .npy, .npz, .csv"
    )
    parser.add_argument(
        "--labels", type=Path, required=True, metavar="FILE", help="the class of each row, whole numbers: .npy, .csv"
    )
    figures.add_argument(parser, "every layer side by side")
    parser.add_argument("--html", type=Path, metavar="FILE", help="the same as a page of its own, dots with their rows")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Measure, print, draw. Raises InsightError."""
    found = model_argument.find(args.model, args.repository)
    model = read(found.path)
    feeds = equation_check.load_rows(args.data, build(model, 1))
    count = len(next(iter(feeds.values())))
    graph = build(model, count)
    named = array_files.read(args.labels, sys.stdin, [TensorInfo("labels", "INT64", (-1,))])
    classes = check_classes(next(iter(named.values())).squeeze(), count)
    steps = layers_to_compare(graph)
    values = {**feeds, **ort_profile.tensors(graph, [name for name in steps if name not in feeds], feeds)}
    measured = [measure(label, values[name], classes) for name, label in steps.items()]
    words = _class_names(found, classes)
    if args.png is not None:
        figures.save(_figure(found.title, measured, classes, words), args.png)
    if args.html is not None:
        args.html.write_text(_page(found.title, measured, classes, words), "utf-8")
    if args.json:
        layers = [
            {
                "tensor": m.tensor,
                "places": m.places,
                "probe_accuracy": m.probe,
                "probe_standard_error": m.probe_error,
                "fisher_ratio": m.fisher,
                "silhouette": m.silhouette,
            }
            for m in measured
        ]
        print(json.dumps({"model": found.title, "rows": count, "layers": layers, "said": said(measured)}, indent=1))
    else:
        print(f"{found.title}: {count} rows of {len(np.unique(classes))} classes")
        print(_table(measured))
        print(f"probe: logistic regression, {FOLDS}-fold, every row held out once")
        print(said(measured))
    return 0


def layers_to_compare(graph: Graph) -> dict[str, str]:
    """Tensors and their labels: the first layer's input, each a between layers, and the last z. Raises InsightError."""
    if len(graph.inputs) > 1 or not graph.layers:
        raise InsightError(
            f"the network has {len(graph.inputs)} inputs and {len(graph.layers)} layers; expected one and at least one"
        )
    prepared = [name for name, label in graph.labels.items() if label == "a0"]
    first = {prepared[0]: "a0"} if prepared else {graph.inputs[0]: graph.inputs[0]}
    inner = {layer.a: f"a{layer.number}" for layer in graph.layers[:-1]}
    return {**first, **inner, graph.layers[-1].z: f"z{len(graph.layers)}"}


def said(measured: Sequence[Separability]) -> str:
    """A sentence on how the probe's accuracy changes with depth."""
    first, last = measured[0], measured[-1]
    best = max(measured, key=lambda m: m.probe)
    falls = [
        f"{after.tensor} ({100 * (after.probe - before.probe):+.1f} points)"
        for before, after in itertools.pairwise(measured)
        if after.probe < before.probe
    ]
    change = 100 * (last.probe - first.probe)
    doubt = 100 * float(np.hypot(first.probe_error, last.probe_error))
    way = "rises" if change > 0 else "falls" if change < 0 else "stays"
    text = (
        f"with depth the probe's accuracy {way} from {first.probe:.1%} ({first.tensor}) to {last.probe:.1%} "
        f"({last.tensor}): {change:+.1f} points, standard error {doubt:.1f}"
    )
    if falls:
        text += f"; it falls at {', '.join(falls)}, and is best at {best.tensor} ({best.probe:.1%})"
    elif change > 0:
        text += "; it falls at no layer"
    return text


def _class_names(found: model_argument.Source, classes: NDArray[np.int64]) -> list[str]:
    """A name for every class present, in order: the contract's labels if they cover all of them, else the numbers."""
    values = np.unique(classes)
    labels = next((t.labels for t in found.contract.outputs if t.labels), None) if found.contract is not None else None
    if labels is not None and values[0] >= 0 and values[-1] < len(labels):
        return [labels[value] for value in values]
    return [str(value) for value in values]


def _table(measured: Sequence[Separability]) -> str:
    rows = [
        [m.tensor, str(m.places), f"{m.probe:.1%} ± {m.probe_error:.1%}", f"{m.fisher:.3f}", f"{m.silhouette:+.3f}"]
        for m in measured
    ]
    return table(["tensor", "places", "linear probe", "Fisher ratio", "silhouette"], rows, left=(0,))


def _shown(classes: NDArray[np.int64]) -> NDArray[np.intp]:
    """Indices of the rows to draw, the same in every picture."""
    order = np.random.default_rng(0).permutation(len(classes))
    return np.asarray(order[:_SHOWN_ROWS])


def _figure(title: str, measured: Sequence[Separability], classes: NDArray[np.int64], words: Sequence[str]) -> Any:
    columns = min(len(measured), 4)
    rows = -(-len(measured) // columns)
    drawn, axes = figures.figure(columns, rows, 10 / columns + (1.2 if rows == 1 else 0.7))
    shown = _shown(classes)
    for axis, one in zip(axes, measured, strict=False):
        for place, value in enumerate(np.unique(classes)):
            own = one.points[shown][classes[shown] == value]
            axis.scatter(own[:, 0], own[:, 1], s=9, color=figures.hue(place), label=words[place], linewidths=0)
        axis.set_title(f"{one.tensor} [{one.places}]\nprobe {one.probe:.1%}")
        axis.set_xlabel(f"component 1 ({one.variance[0]:.0%})")
        axis.set_ylabel(f"component 2 ({one.variance[1]:.0%})")
        axis.tick_params(labelsize=9)
    for axis in axes[len(measured) :]:
        axis.set_axis_off()
    drawn.suptitle(f"{title}: {len(classes)} rows, layer by layer (in brackets: part of the variance)", fontsize=12)
    handles, names = axes[0].get_legend_handles_labels()
    drawn.legend(handles, names, loc="outside lower center", ncols=min(len(words), 10), markerscale=2)
    return drawn


def _page(title: str, measured: Sequence[Separability], classes: NDArray[np.int64], words: Sequence[str]) -> str:
    """A self-contained page: the table, and the panels as SVG whose dots have their row and class as tooltip."""
    shown = _shown(classes)
    values = list(np.unique(classes))
    heads = "".join(f"<th>{h}</th>" for h in ("tensor", "places", "linear probe", "Fisher ratio", "silhouette"))
    rows = "".join(
        f"<tr><td>{m.tensor}</td><td>{m.places}</td><td>{m.probe:.1%} ± {m.probe_error:.1%}</td>"
        f"<td>{m.fisher:.3f}</td><td>{m.silhouette:+.3f}</td></tr>"
        for m in measured
    )
    panels = []
    for one in measured:
        low, high = one.points.min(axis=0), one.points.max(axis=0)
        scaled = (one.points - low) / np.where(high > low, high - low, 1) * (_PANEL - 20) + 10
        dots = "".join(
            f'<circle cx="{scaled[i, 0]:.1f}" cy="{_PANEL - scaled[i, 1]:.1f}" r="3" '
            f'fill="{figures.hue(values.index(classes[i]))}">'
            f"<title>row {i}: {escape(words[values.index(classes[i])])}</title></circle>"
            for i in shown
        )
        panels.append(
            f"<figure><figcaption><b>{one.tensor}</b> [{one.places}], probe {one.probe:.1%}</figcaption>"
            f'<svg viewBox="0 0 {_PANEL} {_PANEL}" width="{_PANEL}" role="img">'
            f'<rect width="{_PANEL}" height="{_PANEL}" fill="none" stroke="#8888"/>{dots}</svg>'
            f"<small>across: component 1 ({one.variance[0]:.0%} of variance); up: component 2 "
            f"({one.variance[1]:.0%})</small></figure>"
        )
    key = " ".join(
        f'<span><b style="color:{figures.hue(place)}">●</b> {escape(word)}</span>' for place, word in enumerate(words)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}: representations</title><style>{_CSS}</style></head><body>"
        f"<h1>{escape(title)}: representations</h1><p>{escape(said(measured))}.</p><p>{key}</p>"
        f"<main>{''.join(panels)}</main><table><tr>{heads}</tr>{rows}</table>"
        f"<p>Probe: logistic regression, {FOLDS}-fold, every row held out once. Point at a dot for its row.</p>"
        "</body></html>\n"
    )


_CSS = (
    ":root{color-scheme:light dark}body{font:15px system-ui,sans-serif;margin:1.5rem auto;max-width:1080px;"
    "padding:0 1rem}main{display:flex;flex-wrap:wrap;gap:12px}figure{margin:0;width:250px}small{opacity:.75}"
    "td,th{padding:.2rem .9rem .2rem 0;text-align:right}span{margin-right:.8rem;white-space:nowrap}"
)
