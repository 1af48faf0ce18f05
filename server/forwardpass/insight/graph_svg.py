"""A network's graph from left to right, as SVG: tensors as columns of units, operators between them. Pure.

800 units wide, legible at that width in pixels; light on dark if the viewer prefers it. A graph with more steps than
fit side by side continues on another line, which begins with the last tensor of the previous one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from forwardpass.console import tables
from forwardpass.model.onnx_graph import AFFINE, Graph, GraphNode

WIDTH = 800
_MARGIN = 52
_COLUMNS = 9  # per line
_UNITS = 10  # maximum drawn for one tensor; a gap stands for the rest
_SPACING = 21  # between units
_HEAD = 54  # title and legend
_LINE = 356  # height of one line of the graph
_BRACKETS = 42  # of that, for what ran
_MIDDLE = 142  # vertical centre of the units, from the line's top

_STYLE = """
  .bg { fill: #ffffff } .text { fill: #1f2328 } .soft { fill: #59636e } .unit { fill: #0969da }
  .given { fill: #8250df } .dense { stroke: #818b98; stroke-width: .6; opacity: .55 }
  .one { stroke: #818b98; stroke-width: 1.2 } .run { stroke: #bc4c00; fill: none; stroke-width: 1.6 }
  .ran { fill: #bc4c00 } text { font-family: system-ui, sans-serif; text-anchor: middle; font-size: 13px }
  .title { font-size: 16px; font-weight: 600; text-anchor: start } .name { font-weight: 600; font-size: 15px }
  .small { font-size: 12px } .start { text-anchor: start; font-size: 12px }
  @media (prefers-color-scheme: dark) {
    .bg { fill: #0d1117 } .text { fill: #f0f6fc } .soft { fill: #9198a1 } .unit { fill: #4493f8 }
    .given { fill: #ab7df8 } .dense { stroke: #9198a1 } .one { stroke: #9198a1 } .run { stroke: #f0883e }
    .ran { fill: #f0883e }
  }
"""


@dataclass(frozen=True, slots=True)
class ExecutedStep:
    """One executed node, and the file's nodes that it covers."""

    op: str
    covers: tuple[str, ...]
    note: str  # "2.1 µs, 41 %"


@dataclass(frozen=True, slots=True)
class _Column:
    """The position of a tensor in one line of the picture."""

    tensor: str
    x: float
    ys: tuple[float, ...]  # of the units that fit
    gap: int  # index among them of the gap that stands for the units that do not fit; -1: none

    @property
    def drawn(self) -> tuple[float, ...]:
        return tuple(y for place, y in enumerate(self.ys) if place != self.gap)


def svg(graph: Graph, title: str, ran: Sequence[ExecutedStep], stored: dict[str, int]) -> str:
    """The picture. `ran`: the executed nodes, if any ran; `stored`: the number of stored values by node name.

    A size of -1 is that of the batch, and is written B.
    """
    nodes = [node for node in graph.nodes if not graph.is_fixed(node)]
    rank = dict.fromkeys(graph.inputs, 0)
    for node in nodes:
        step = 1 + max(rank[name] for name in node.inputs if name in rank)
        rank.update(dict.fromkeys((name for name in node.outputs if name), step))
    last = max(rank.values())
    starts = list(range(0, max(last, 1), _COLUMNS - 1))
    gap = min(170.0, (WIDTH - 2 * _MARGIN) / min(max(last, 1), _COLUMNS - 1))
    line = _LINE if ran else _LINE - _BRACKETS
    height = _HEAD + line * len(starts)
    brackets = ", and in brackets what runs, with the time of a batch and its share" if ran else ""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="bg" width="{WIDTH}" height="{height}" rx="8"/>',
        f'<text class="text title" x="16" y="28">{escape(title)}</text>',
        '<text class="soft start" x="16" y="48">columns: tensors and their shapes; below: the operators'
        f"{brackets}</text>",
    ]
    for number, start in enumerate(starts):
        end = min(start + _COLUMNS - 1, last)
        shown = [name for name, step in rank.items() if start <= step <= end]
        # Centred, if it does not fill the width.
        left = (WIDTH - gap * (end - start)) / 2 if len(starts) == 1 else _MARGIN
        top = _HEAD + number * line
        columns = _columns(graph, shown, rank, start=start, left=left, gap=gap, top=top)
        inner = [node for node in nodes if start < rank[node.outputs[0]] <= end]
        parts += _edges(graph, inner, columns)
        parts += _tensors(graph, columns, top, gap)
        parts += _operators(inner, columns, stored, top, gap)
        parts += _executed(inner, columns, ran, top, gap)
    return "\n".join([*parts, "</svg>", ""])


def _columns(
    graph: Graph, shown: Sequence[str], rank: dict[str, int], *, start: int, left: float, gap: float, top: float
) -> dict[str, _Column]:
    columns = {}
    for step in sorted({rank[name] for name in shown}):
        beside = [name for name in shown if rank[name] == step]  # tensors of the same step share the height
        room = max(3, _UNITS // len(beside))
        for place, name in enumerate(beside):
            width = _width(graph, name)
            count = min(width, room)
            middle = top + _MIDDLE + (place - (len(beside) - 1) / 2) * (room + 1.5) * _SPACING
            ys = tuple(middle + (i - (count - 1) / 2) * _SPACING for i in range(count))
            columns[name] = _Column(name, left + (step - start) * gap, ys, count // 2 if width > count else -1)
    return columns


def _edges(graph: Graph, nodes: Sequence[GraphNode], columns: dict[str, _Column]) -> list[str]:
    lines = []
    for node in nodes:
        end = columns[node.outputs[0]]
        for name in dict.fromkeys(node.inputs):
            start = columns.get(name)
            if start is None or name in graph.fixed:
                continue
            if node.op in AFFINE:
                pairs, kind = [(a, b) for a in start.drawn for b in end.drawn], "dense"
            elif len(start.drawn) == len(end.drawn):
                pairs, kind = list(zip(start.drawn, end.drawn, strict=True)), "one"
            else:
                pairs, kind = [(_middle(start), _middle(end))], "one"
            drawn = "".join(f"M{start.x:.0f} {a:.0f}L{end.x:.0f} {b:.0f}" for a, b in pairs)
            lines.append(f'<path class="{kind}" d="{drawn}" fill="none"/>')
    return lines


def _tensors(graph: Graph, columns: dict[str, _Column], top: float, gap: float) -> list[str]:
    parts = []
    for name, column in columns.items():
        shape = graph.shapes.get(name)
        kind = "given" if name in graph.inputs else "unit"
        for place, y in enumerate(column.ys):
            if place == column.gap:  # three small dots instead of a unit
                parts += [f'<circle class="{kind}" cx="{column.x:.0f}" cy="{y + d:.0f}" r="1.6"/>' for d in (-5, 0, 5)]
            else:
                parts.append(f'<circle class="{kind}" cx="{column.x:.0f}" cy="{y:.0f}" r="6"/>')
        label = name if name in graph.inputs else graph.labels.get(name, "")
        above = min(column.ys, default=top + _MIDDLE) - 18
        below = max(column.ys, default=top + _MIDDLE) + 26
        parts.append(f'<text class="text name" x="{column.x:.0f}" y="{above:.0f}">{escape(_short(label, gap))}</text>')
        parts.append(f'<text class="soft" x="{column.x:.0f}" y="{below:.0f}">{_sizes(shape)}</text>')
    return parts


def _operators(
    nodes: Sequence[GraphNode], columns: dict[str, _Column], stored: dict[str, int], top: float, gap: float
) -> list[str]:
    """The file's operators, below the gap between the columns that each connects; parallel branches share a gap."""
    parts = []
    beside: dict[float, list[GraphNode]] = {}
    for node in nodes:
        beside.setdefault(columns[node.outputs[0]].x - gap / 2, []).append(node)
    for x, together in beside.items():
        name = _short(" | ".join(node.op for node in together), gap)
        parts.append(f'<text class="text" x="{x:.0f}" y="{top + 284:.0f}">{escape(name)}</text>')
        numbers = sum(stored.get(node.name, 0) for node in together)
        if numbers:
            told = tables.si(numbers) if numbers >= 10_000 else f"{numbers:,}"
            parts.append(f'<text class="soft small" x="{x:.0f}" y="{top + 300:.0f}">{told} stored</text>')
    return parts


def _executed(
    nodes: Sequence[GraphNode], columns: dict[str, _Column], ran: Sequence[ExecutedStep], top: float, gap: float
) -> list[str]:
    """The executed nodes: each a bracket spanning the operators that it covers, with its time."""
    parts = []
    spans: dict[tuple[float, float], list[ExecutedStep]] = {}
    for step in ran:
        ends = [columns[node.outputs[0]].x for node in nodes if node.name in step.covers]
        if ends:
            spans.setdefault((min(ends) - gap + 8, max(ends) - 8), []).append(step)
    for (left, right), together in spans.items():
        y, middle = top + 311, (left + right) / 2
        parts.append(f'<path class="run" d="M{left:.0f} {y - 5:.0f}v5H{right:.0f}v-5"/>')
        for below, words in ((17, " | ".join(s.op for s in together)), (33, " | ".join(s.note for s in together))):
            text = escape(_short(words, right - left + 16))
            parts.append(f'<text class="ran" x="{middle:.0f}" y="{y + below:.0f}">{text}</text>')
    return parts


def _sizes(shape: Sequence[int] | None) -> str:
    return tables.shape(shape).replace("-1", "B")


def _width(graph: Graph, tensor: str) -> int:
    """Units of one row: the size of the last axis; 1 if there is only the batch axis, or the shape is unknown."""
    shape = graph.shapes.get(tensor)
    return max(shape[-1], 1) if shape is not None and len(shape) > 1 else 1


def _middle(column: _Column) -> float:
    return sum(column.ys) / max(len(column.ys), 1)


def _short(text: str, width: float) -> str:
    most = int(width / 7.2)  # characters, by the font's usual width
    return text if len(text) <= most else text[: most - 1] + "…"
