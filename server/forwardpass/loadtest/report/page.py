"""The page around the plots: one HTML file with inline style, light and dark, also for phones. No script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --bg: #fff; --card: #f6f8fa; --text: #1f2328; --soft: #59636e; --grid: #d1d9e0;
  --s0: #0969da; --s1: #bc4c00; --s2: #1a7f37; --warn: #9a6700; --band: #1a7f3733; }
@media (prefers-color-scheme: dark) { :root { --bg: #0d1117; --card: #151b23; --text: #f0f6fc; --soft: #9198a1;
  --grid: #30363d; --s0: #4493f8; --s1: #f0883e; --s2: #3fb950; --warn: #d29922; --band: #3fb95033; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1080px; padding: 16px; background: var(--bg); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.4rem; margin: .2em 0 } h2 { font-size: 1.1rem; margin: 1.6em 0 .5em }
p { margin: .4em 0 } .soft, .legend, figcaption + svg + .legend { color: var(--soft) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 8px; margin: 10px 0 }
.tile { background: var(--card); border-radius: 8px; padding: 8px 12px } .tile b { display: block; font-size: 1.25rem }
.tile span { color: var(--soft); font-size: .85rem } .tile.o0 { border-left: 4px solid var(--s0) }
.tile.o1 { border-left: 4px solid var(--s1) }
.warn { border-left: 4px solid var(--warn); background: var(--card); padding: 8px 12px; border-radius: 0 8px 8px 0;
  margin: 8px 0 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 16px }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: 10px; min-width: 0 }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: 4px } figure > svg { display: block; width: 100% }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .85rem } .key { width: 22px; margin-right: 5px }
.grid { stroke: var(--grid); stroke-width: .7; fill: none } svg text { fill: var(--soft); font-size: 11px;
  text-anchor: middle } svg .label { fill: var(--text) } svg .end { text-anchor: end } svg .start { text-anchor: start }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round } .mark { stroke: none }
.line.s0 { stroke: var(--s0) } .line.s1 { stroke: var(--s1) } .line.s2 { stroke: var(--s2) }
.line.soft { stroke: var(--soft) } .line.ink { stroke: var(--text) }
.mark.s0, .bar.s0, .cell.s0 { fill: var(--s0) } .mark.s1, .bar.s1, .cell.s1 { fill: var(--s1) }
.mark.s2, .bar.s2 { fill: var(--s2) } .mark.soft { fill: var(--soft) }
.dash { stroke-dasharray: 6 3 } .dots { stroke-dasharray: 1.5 3 }
.guide { stroke: var(--s2); stroke-width: 1.3; stroke-dasharray: 4 3; fill: none } svg .word { fill: var(--s2) }
.band { fill: var(--band) }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .88rem; white-space: nowrap }
th, td { text-align: right; padding: 3px 10px; border-bottom: 1px solid var(--grid) } th { color: var(--soft) }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
"""


def page(title: str, under: str, sections: Sequence[str]) -> str:
    """A whole document. `under` is a sentence below the title; `sections` are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f'<body><h1>{escape(title)}</h1><p class="soft">{escape(under)}</p>\n'
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def section(title: str, *content: str) -> str:
    return f"<h2>{escape(title)}</h2>" + "".join(content)


def plots(*figures: str) -> str:
    return f'<div class="plots">{"".join(figures)}</div>'


def tiles(style: str, values: Sequence[tuple[str, str]]) -> str:
    """(figure, caption) pairs side by side; `style` o0 or o1 marks the server."""
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile {style}"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for v, k in values)
        + "</div>"
    )


def warning(text: str) -> str:
    return f'<div class="warn">{escape(text)}</div>'


def text(words: str) -> str:
    return f"<p>{escape(words)}</p>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column left-aligned, the others right-aligned; scrolls sideways if too wide."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
