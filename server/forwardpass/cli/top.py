"""`forwardpass top`: the status page in a terminal. Reads its JSON over HTTP every second; needs rich (extra `top`).

Without a terminal, and with --once, one frame is printed, for scripts and logs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import ssl
import time
import urllib.error
import urllib.request
from datetime import datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from forwardpass.client.credentials import is_local, token_source
from forwardpass.console import tables
from forwardpass.console.arguments import seconds
from forwardpass.errors import ForwardpassError
from forwardpass.optional_imports import need
from forwardpass.watched_files import read_bytes

PATH = "/status/snapshot.json"
DEFAULT = ["http://127.0.0.1:8000", "http://127.0.0.1:8002"]  # the first that has a page is taken
BARS = " ▁▂▃▄▅▆▇█"
NONE = "–"  # where there is no figure
SHOWN_ERRORS = 6
WIDE = 128
SHOWN = (("total", "p50"), ("total", "p99"), ("queue", "p99"), ("run", "p99"))
TIMEOUT = 10.0

STYLES = {"ready": "green", "failed": "bold red", "stale": "yellow", "loading": "yellow", "unloading": "yellow"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        action="append",
        help=f"the server's HTTP port, or its metrics port if it has none [{', '.join(DEFAULT)}]",
    )
    parser.add_argument("--every", type=seconds, default=1.0, metavar="SECONDS", help="[%(default)s]")
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="a file with the token to bring")
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="authorities of the server's certificate, PEM")
    parser.add_argument(
        "--plaintext-token", action="store_true", help="bring it to other machines without TLS too, as inside a mesh"
    )


def run(args: argparse.Namespace) -> int:
    """Show figures until Ctrl-C. Raises ForwardpassError where there is no server, or no page, or no token."""
    rich_console, live = need("rich.console", "top"), need("rich.live", "top")
    sources = [_Source(url, args) for url in args.url or DEFAULT]
    source, snapshot = _first(sources)
    console = rich_console.Console()
    if args.once or not console.is_terminal:
        if snapshot["traffic"] is None:  # nobody looked before: rates need a second look
            time.sleep(1.0)
            snapshot = source.read()
        console.print(frame(snapshot, source.url, console.width))
        return 0
    shown = live.Live(frame(snapshot, source.url, console.width), console=console, screen=True, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), shown:  # Ctrl-C is how it ends
        while True:
            time.sleep(args.every)
            try:
                snapshot, problem = source.read(), ""
            except ForwardpassError as error:
                problem = str(error)
            shown.update(frame(snapshot, source.url, console.width, problem), refresh=True)
    return 0


class _Source:
    """The snapshot of one server."""

    def __init__(self, url: str, args: argparse.Namespace) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ForwardpassError(f"--url: expected http://HOST:PORT, got {url}")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._token = token_source(None, args.token_file)
        plain = parts.scheme == "http" and not args.plaintext_token
        if self._token is not None and plain and not is_local(parts.netloc):
            raise ForwardpassError(
                f"--token-file: {parts.netloc} is another machine and the address has no TLS, so that the token could "
                "be read on the way; --plaintext-token sends it nevertheless"
            )
        # A proxy is for the world outside; a redirect could take the token elsewhere.
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({}), _NoRedirect()]
        if args.tls_ca is not None:
            read_bytes(args.tls_ca, "--tls-ca")  # whose error names it
            handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=args.tls_ca)))
        self._opener = urllib.request.build_opener(*handlers)

    def read(self) -> dict[str, Any]:
        headers = {} if self._token is None else {"Authorization": self._token()}
        try:
            with self._opener.open(
                urllib.request.Request(self.url + PATH, headers=headers), timeout=TIMEOUT
            ) as response:
                found: dict[str, Any] = json.loads(response.read())
                return found
        except urllib.error.HTTPError as error:
            raise ForwardpassError(f"{self.url}: {_meaning(error.code)}") from None
        except (OSError, HTTPException) as error:
            raise ForwardpassError(f"{self.url}: no answer: {getattr(error, 'reason', error)}") from None
        except ValueError:
            raise ForwardpassError(f"{self.url}: is not a status page: expected JSON") from None


def _first(sources: list[_Source]) -> tuple[_Source, dict[str, Any]]:
    """The first source that answers, and its snapshot. Raises ForwardpassError with what each said."""
    problems = []
    for source in sources:
        try:
            return source, source.read()
        except ForwardpassError as error:
            problems.append(str(error))
    raise ForwardpassError("; ".join(problems))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _meaning(code: int) -> str:
    match code:
        case 401 | 403:
            return f"{code}: it asks for a token of the role infer: --token-file"
        case 404:
            return "404: expected a status page there; --no-status-page turns it off, and so does an older server"
    return f"HTTP {code}"


# -- the frame --------------------------------------------------------------------------------------------------------


def frame(snapshot: dict[str, Any], url: str, width: int, problem: str = "") -> Any:
    """What rich prints: a head, models, refusals, errors. Less than WIDE columns leave some of the models' out."""
    group = need("rich.console", "top").Group
    parts = [_head(snapshot, url, problem), _models(snapshot, width >= WIDE)]
    if snapshot["refused"]:
        parts.append(_refusals(snapshot))
    if snapshot["errors"]:
        parts.append(_errors(snapshot))
    return group(*parts)


def _head(snapshot: dict[str, Any], url: str, problem: str) -> Any:
    rich_text, panel = need("rich.text", "top"), need("rich.panel", "top")
    server, traffic, chart = snapshot["server"], snapshot["traffic"] or {}, snapshot["chart"]
    total = traffic.get("stages", {}).get("total", {})
    text = rich_text.Text()

    def figure(value: str, name: str) -> None:
        text.append(value, "bold").append(f" {name}   ", "dim")

    figure(count(traffic.get("requests_per_second")), "requests/s")
    figure(duration(total.get("p50")), "p50")
    figure(duration(total.get("p99")), "p99")
    figure(count(traffic.get("rows_per_batch")), "rows a batch")
    figure(count(snapshot["queue_requests"]), "waiting")
    figure(count(traffic.get("failed_per_second")), "refused/s")
    text.append("\n")
    text.append(spark(chart["requests_per_second"][-60:]), "blue").append(" requests/s in the last minute\n", "dim")
    figure(", ".join(server["providers"]) or NONE, "provider")
    figure(memory(server["resident_bytes"]), "memory")
    figure(f"{count(server['cores_used'])} of {server['cores']}", "cores")
    figure(count(server["threads"]), "threads")
    figure(count(server["open_files"]), "files")
    if problem:
        text.append(f"\n{problem}", "bold red")
    state = "[green]ready[/]" if server["ready"] and not problem else "[bold red]not ready[/]"
    minutes, _ = divmod(int(server["uptime_seconds"]), 60)
    title = f"[bold]Forwardpass[/] {server['version']} · {state} · up {minutes // 60} h {minutes % 60} min · {url}"
    return panel.Panel(text, title=title, title_align="left", border_style="dim", padding=(0, 1))


def _table(title: str, *columns: tuple[str, str]) -> Any:
    made = need("rich.table", "top").Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), header_style="dim"
    )
    for name, justify in columns:
        made.add_column(name, justify=justify, overflow="fold", no_wrap=name != "text")
    return made


def _models(snapshot: dict[str, Any], wide: bool) -> Any:
    text = need("rich.text", "top").Text
    shown = SHOWN if wide else SHOWN[:2]
    titles = [share if stage == "total" else f"{stage} {share}" for stage, share in shown]
    numbers = ["requests/s", *titles, "rows/batch", "waiting"]
    made = _table(
        "\nModels",
        *((name, "left") for name in ("model", "state", "batching", *(["last 20 s"] if wide else []))),
        *((name, "right") for name in numbers),
    )
    for model in snapshot["models"]:
        name, style = text(f"{model['name']} {model['version']}".rstrip()), STYLES.get(model["state"], "dim")
        if "batching" not in model:
            made.add_row(name, text(model["state"], style), text(NONE))
            continue
        traffic, batching = model["traffic"] or {}, model["batching"]
        quantiles = traffic.get("stages", {})
        made.add_row(
            name,
            text(model["state"], style),
            text(batching["verdict"] + (f", {batching['most_rows']} rows" if wide else "")),
            *([text(spark(model["chart"][-20:]), "blue")] if wide else []),
            count(traffic.get("requests_per_second")),
            *(duration(quantiles.get(stage, {}).get(share)) for stage, share in shown),
            count(traffic.get("rows_per_batch")),
            count(model["queue"]["requests"]),
        )
    return made


def _refusals(snapshot: dict[str, Any]) -> Any:
    text = need("rich.text", "top").Text
    made = _table("\nRefusals", ("model", "left"), ("reason", "left"), ("a second", "right"), ("in total", "right"))
    for one in snapshot["refused"][:SHOWN_ERRORS]:
        name = f"{one['model']} {one['version']}".strip() or "none"
        made.add_row(text(name), text(one["reason"]), count(one["per_second"]), count(one["total"]))
    return made


def _errors(snapshot: dict[str, Any]) -> Any:
    text = need("rich.text", "top").Text
    made = _table(
        "\nLast errors", *((name, "left") for name in ("time", "model", "status", "text")), ("times", "right")
    )
    for one in snapshot["errors"][:SHOWN_ERRORS]:
        at = datetime.fromtimestamp(one["at"]).strftime("%H:%M:%S")
        name = f"{one['model']} {one['version']}".strip() or "none"
        made.add_row(at, text(name), text(one["code"], "red"), text(one["text"]), count(one["times"]))
    return made


def count(value: float | None) -> str:
    """Three digits, and all of a whole number; a dash for none."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def duration(value: float | None) -> str:
    return NONE if value is None else tables.si(value, "s")


def memory(value: float | None) -> str:
    return NONE if value is None else f"{value / (1 << 20):,.0f} MiB"


def spark(values: list[float | None]) -> str:
    """A line of bars, as high as their share of the highest; a blank for none."""
    highest = max((value for value in values if value is not None), default=0.0)
    if not highest:
        return ""
    return "".join(" " if v is None else BARS[max(1, round(v / highest * (len(BARS) - 1)))] for v in values)
