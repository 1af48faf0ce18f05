"""The page: that it stands alone, says what was measured, and, in a real browser, shows its plots."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.unit.loadtest.made import measured, server_window

from forwardpass.loadtest import objective_search
from forwardpass.loadtest.objective_search import Knee
from forwardpass.loadtest.report import load_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]

# What the browser makes of the page: for each plot the size of its drawing, and how many of its marks can be seen.
LOOK = """<script>
const seen = (svg) => [...svg.querySelectorAll(".line,.bar,.cell,.mark")].filter((e) => {
  const box = e.getBoundingClientRect(), style = getComputedStyle(e);
  return box.width + box.height > 1 && (style.stroke !== "none" || style.fill !== "none"); }).length;
const plots = [...document.querySelectorAll("figure")].map((figure) => {
  const svg = figure.querySelector(":scope > svg");
  const box = svg.getBoundingClientRect();
  return {plot: figure.dataset.plot, width: box.width, height: box.height, seen: seen(svg),
          texts: svg.querySelectorAll("text").length, right: box.right}; });
const text = JSON.stringify({plots, wide: document.documentElement.scrollWidth, window: innerWidth,
  background: getComputedStyle(document.body).backgroundColor});
document.body.insertAdjacentHTML("beforeend", `<pre id="looked">${text}</pre>`);
</script>"""


def _page() -> str:
    a = [measured(rate, 0.001 * rate / 500, server=server_window()) for rate in (500, 1000, 2000)]
    b = [measured(rate, 0.002 * rate / 500, target="b:1", failed=20, server=server_window()) for rate in (500, 2000)]
    knee = Knee(objective_search.parse("p99=10ms"), [990, 1010], 1000, 950, 1050, a[1], a, False)
    return load_report.as_html([*a, *b], [knee])


def test_it_stands_alone_and_escapes_what_a_server_said() -> None:
    text = _page()
    assert not re.search(r"(?:src|href)=|url\(|@import|<script", text)
    assert "the queue is &lt;full&gt;" in text and "<full>" not in text


def test_csv_and_json_have_every_measurement() -> None:
    points = [measured(500), measured(1000, failed=3), measured(in_flight=4)]
    rows = list(csv.DictReader(io.StringIO(load_report.as_csv(points))))
    assert [row["loop"] for row in rows] == ["open", "open", "closed"]
    assert rows[1]["failed"] == "3" and float(rows[0]["p99_ms"]) > float(rows[0]["p50_ms"])
    said = json.loads(load_report.as_json(points, []))
    assert [m["outcomes"]["OK"] for m in said["measurements"]] == [1000, 2000, 2000]


def test_nothing_measured_is_still_a_page() -> None:
    assert "<figure" in load_report.as_html([measured(rate=0.0, failed=10)], [])


@pytest.mark.skipif(CHROMIUM is None, reason="needs the browser chromium, which is not installed")
@pytest.mark.parametrize("width", [400, 1100])
def test_a_browser_shows_the_plots(tmp_path: Path, width: int) -> None:
    looked = _look(tmp_path, width)
    kinds = [plot["plot"] for plot in looked["plots"]]
    assert kinds == ["latency", "throughput", "cdf", "heat", "heat", "batch_rows", "queue_seconds"]
    for plot in looked["plots"]:
        assert plot["width"] > 250 and plot["height"] > 150, plot
        assert plot["seen"] >= 2 and plot["texts"] >= 6, plot
        assert plot["right"] <= looked["window"], plot
    assert sum(plot["seen"] for plot in looked["plots"] if plot["plot"] == "heat") > 200
    assert looked["wide"] <= looked["window"]  # nothing to scroll sideways


@pytest.mark.skipif(CHROMIUM is None, reason="needs the browser chromium, which is not installed")
def test_a_browser_that_prefers_dark_gets_it(tmp_path: Path) -> None:
    light = _look(tmp_path, 800)["background"]
    dark = _look(tmp_path, 800, "--blink-settings=preferredColorScheme=0")["background"]
    assert light == "rgb(255, 255, 255)" and dark == "rgb(13, 17, 23)"


def _look(folder: Path, width: int, *flags: str) -> Any:
    page = folder / "page.html"
    page.write_text(_page().replace("</body>", LOOK + "</body>"), "utf-8")
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [str(CHROMIUM), *FLAGS, *flags, profile, f"--window-size={width},3000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    *_, found = re.findall(r'<pre id="looked">(.*?)</pre>', done.stdout, re.DOTALL) or [done.stderr[-2000:]]
    return json.loads(html.unescape(found))
