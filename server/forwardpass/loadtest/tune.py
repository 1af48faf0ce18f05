"""`forwardpass tune`: the options of model.toml under which a model answers most requests in time, found by measuring.

All candidates are models of one real server process, so that none waits for a start. Each is offered a load that grows
through what can be answered, by the open-loop client with the objective as deadline; what counts is how many answers
came in time. A state file remembers every measurement: a second run goes on where the first ended.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from forwardpass.errors import LoadTestError
from forwardpass.loadtest import bodies, charts, fleet, halving, histogram, page, slo
from forwardpass.loadtest.charts import Series
from forwardpass.loadtest.command import _count, _objective, _seconds
from forwardpass.loadtest.halving import RUNGS, Rung, Score, Setting
from forwardpass.loadtest.measured import ms
from forwardpass.loadtest.schedule import Phase
from forwardpass.loadtest.target import Client, Target
from forwardpass.server_process import ServerProcess

GRID = {
    "max_batch_size": (16, 64, 256),
    "instances": (1, 2),
    "intra_op_threads": (1, 2),
    "max_queue_delay_us": (0, 200, 1000),
}
RAMP = 0.3, 1.3  # of what the present setting answers in a closed loop: from easy to more than can be done
_CLOSED = 128  # requests in flight there
_WARM_UP = 0.25  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model of the repository")
    parser.add_argument("--slo", type=_objective, required=True, metavar="p99=5ms", help="the objective")
    parser.add_argument("--repository", type=Path, default=Path("models"), metavar="FOLDER", help="[%(default)s]")
    parser.add_argument("--rows", type=_count, default=1, metavar="N", help="rows of a request [%(default)s]")
    for name, values in GRID.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=_values, default=values, metavar="N,N", help=f"[{','.join(map(str, values))}]")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the winner's options [the model's own model.toml]")
    parser.add_argument("--state", type=Path, metavar="FILE", help="what was measured so far [tune-MODEL.json]")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page with the trade-off")
    parser.add_argument(
        "--seconds",
        type=_lengths,
        default=[rung.seconds for rung in RUNGS],
        metavar="S,S,S",
        help="of a measurement: of all settings, of the better ones, of the last [0.3,1.2,4]; the last is made thrice",
    )
    parser.add_argument("--exhaustive", action="store_true", help="measure the whole grid at length too, and compare")
    parser.add_argument("--server-core", type=int, metavar="N", help="pin the server to this core")
    parser.add_argument("--core", type=int, metavar="N", help="pin the load generator to this core")


@dataclasses.dataclass(slots=True)
class _State:
    """What was measured, in a file. `scores`: [answers in time a second, latency, seconds that measuring it took] by
    setting and rung, in words."""

    path: Path
    key: str  # of what was tuned, for what: another one begins anew
    rate: float = 0.0
    scores: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, key: str) -> _State:
        found = cls(path, key)
        if path.exists():
            try:
                said = json.loads(path.read_text("utf-8"))
                if said["key"] == key:
                    found.rate = float(said["rate"])
                    found.scores = {name: [float(figure) for figure in score] for name, score in said["scores"].items()}
                    if any(len(score) != 3 for score in found.scores.values()):
                        raise ValueError("a score has three figures")
            except (ValueError, KeyError, TypeError, AttributeError):
                raise LoadTestError(
                    f"{path} is not what an earlier run left: remove it, or name another --state"
                ) from None
        return found

    def save(self) -> None:
        said = {"key": self.key, "rate": self.rate, "scores": self.scores}
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(said, indent=1) + "\n", "utf-8")
        beside.replace(self.path)

    def spent(self, rungs: Sequence[Iterable[Setting]], lengths: Sequence[Rung]) -> float:
        """Seconds that measuring these settings for these lengths took, in this run or an earlier one."""
        keys = [_key(setting, length) for rung, length in zip(rungs, lengths, strict=True) for setting in rung]
        return sum(self.scores[key][2] for key in keys)


def run(args: argparse.Namespace) -> int:
    """Measure what is left to measure, write model.toml and the report. Raises LoadTestError."""
    folder = args.repository / args.model
    versions = [path.parent for path in folder.glob("*/model.onnx") if path.parent.name.isdecimal()]
    if not versions:
        raise LoadTestError(f"{folder} has no version of '{args.model}' with a model.onnx")
    version = max(versions, key=lambda path: int(path.name))
    present = _options(folder / "model.toml")
    options = {name: getattr(args, name) for name in GRID}
    first = tuple((name, int(present.get(name) or values[0])) for name, values in options.items())
    settings = [first, *[setting for setting in halving.grid(options) if setting != first]]
    key = f"{args.model} version {version.name}, {args.slo}, {args.rows} row(s), present {_words(first)}"
    state = _State.open(args.state or Path(f"tune-{args.model}.json"), key)
    with fleet.unwinding(), tempfile.TemporaryDirectory(prefix="forwardpass-tune-") as made:
        names = _repository(Path(made), version, settings, present)
        with _on(args.server_core):
            started = ServerProcess(Path(made), "--log-level", "warning", patience=600.0)
        with started as server:
            bench = _Bench(server, names, state, args)
            lengths = [Rung(s, rung.repeats) for s, rung in zip(args.seconds, RUNGS, strict=True)]
            rungs = halving.search(settings, bench.measure, lengths)
            whole = {setting: bench.measure(setting, lengths[-1]) for setting in settings} if args.exhaustive else {}
    winner = halving.best(rungs[-1])
    spent = state.spent(rungs, lengths)
    text = toml(winner, rungs, present, key, state.rate, spent)
    output: Path = args.output or folder / "model.toml"
    if output.exists():
        shutil.copy2(output, output.with_suffix(".toml.old"))
    output.write_text(text, "utf-8")
    print(_told(winner, first, rungs, spent))
    if whole:
        print(_compared(winner, whole, spent, state.spent([whole], lengths[-1:])))
    print(f"wrote {output}")
    if args.report:
        args.report.write_text(_html(args, winner, first, rungs, key, state.rate), "utf-8")
    return 0


def _options(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8")) if path.exists() else {}
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise LoadTestError(f"{path}: {error}") from None


def _repository(
    made: Path, version: Path, settings: Sequence[Setting], present: Mapping[str, Any]
) -> dict[Setting, str]:
    """A repository with one model for each setting; their names."""
    names = {}
    for number, setting in enumerate(settings):
        name = f"candidate-{number:03d}"
        shutil.copytree(version, made / name / "1")
        labels = present.get("labels")
        if labels:
            shutil.copy2(version.parent / labels, made / name)
        (made / name / "model.toml").write_text(_assignments({**present, **dict(setting)}))
        names[setting] = name
    return names


def _assignments(options: Mapping[str, Any]) -> str:
    """As TOML: a model's options are numbers, words, truth values and lists of numbers, which JSON writes alike."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in options.items())


@contextlib.contextmanager
def _on(core: int | None) -> Iterator[None]:
    """What is started meanwhile runs on that core, and knows it has no more."""
    before = os.sched_getaffinity(0)
    try:
        if core is not None:
            os.sched_setaffinity(0, {core})
        yield
    finally:
        os.sched_setaffinity(0, before)


class _Bench:
    """Measures one setting after the other on one server."""

    def __init__(
        self, server: ServerProcess, names: Mapping[Setting, str], state: _State, args: argparse.Namespace
    ) -> None:
        self._server, self._names, self._state, self._args = server, names, state, args
        if not state.rate:
            target = self._target(next(iter(names)), deadline=None)
            state.rate = target.closed(_CLOSED, 2.0).throughput
            state.save()
        if not state.rate:
            raise LoadTestError("the server answered nothing in a closed loop")

    def _target(self, setting: Setting, deadline: float | None) -> Target:
        address, name, args = self._server.address, self._names[setting], self._args
        requests = bodies.make(bodies.info(address, name), "", {args.rows: 1.0}, None, 0)
        # What comes later than the deadline and a while is too late whatever it is.
        client = Client(core=args.core, deadline=deadline, warm_up=_WARM_UP, patience=0.25)
        return Target(address, name, requests, client, metrics_url="")

    def measure(self, setting: Setting, rung: Rung) -> Score:
        """Looks first whether it is known."""
        state, objective = self._state, self._args.slo
        key = _key(setting, rung)
        if key not in state.scores:
            began = time.monotonic()
            target = self._target(setting, objective.seconds)
            ramp = [Phase(rung.seconds, RAMP[0] * state.rate, RAMP[1] * state.rate)]
            points = [target.phases(ramp) for _ in range(rung.repeats)]
            in_time = statistics.median(point.goodput for point in points)
            # The latency is that of the easy half: in the other one it says how long the queue got.
            easy = [point.recording.latency[: point.recording.slices // 2].sum(axis=0) for point in points]
            latency = statistics.median(histogram.quantile(counts, objective.q) for counts in easy)
            # JSON has no nan: a setting that answered nothing comes last.
            state.scores[key] = [in_time, latency if latency == latency else 1e9, time.monotonic() - began]
            state.save()
            print(f"{key}: {in_time:,.0f}/s in time, {ms(latency)}", file=sys.stderr)
        return Score(*state.scores[key][:2])


def _key(setting: Setting, rung: Rung) -> str:
    return f"{_words(setting)} @ {rung.seconds:g} s x {rung.repeats}"


def _words(setting: Setting) -> str:
    return " ".join(f"{name}={value}" for name, value in setting)


def toml(
    winner: Setting,
    rungs: Sequence[Mapping[Setting, Score]],
    present: Mapping[str, Any],
    key: str,
    rate: float,
    spent: float,
) -> str:
    """A model.toml with the winner's options, the others as they were, and why."""
    today = datetime.datetime.now(datetime.UTC).date()
    lines = [
        f"# Tuned {today} by `forwardpass tune`: {key}.",
        f"# {len(rungs[0])} settings in {spent:.0f} s of measuring, each offered {RAMP[0] * rate:,.0f} to "
        f"{RAMP[1] * rate:,.0f} requests/s",
        "# with the objective as deadline. Answers in time a second, and latency in the easy half, best first:",
    ]
    for setting, score in sorted(rungs[-1].items(), key=lambda item: -item[1].in_time):
        mark = "  <- chosen" if setting == winner else ""
        lines.append(f"#   {score.in_time:>9,.0f}/s {ms(score.latency):>9}  {_words(setting)}{mark}")
    return "\n".join(lines) + "\n" + _assignments({**present, **dict(winner)})


def _told(winner: Setting, first: Setting, rungs: Sequence[Mapping[Setting, Score]], spent: float) -> str:
    last = rungs[-1]
    gain = last[winner].in_time / last[first].in_time - 1 if last[first].in_time else float("inf")
    counts = " -> ".join(str(len(rung)) for rung in rungs)
    return (
        f"{_words(winner)}: {last[winner].in_time:,.0f} answers/s in time, {gain:+.0%} of the present setting's "
        f"{last[first].in_time:,.0f}; {counts} settings in {spent:.0f} s"
    )


def _compared(winner: Setting, whole: Mapping[Setting, Score], spent: float, grid_seconds: float) -> str:
    """Against the grid, measured at length. The finalists' measurements count for both."""
    champion = halving.best(whole)
    return (
        f"whole grid: best {_words(champion)} with {whole[champion].in_time:,.0f}/s in time; the one chosen has "
        f"{whole[winner].in_time / whole[champion].in_time:.1%} of that, in {spent / grid_seconds:.0%} of the grid's "
        f"{grid_seconds:.0f} s"
    )


def _html(
    args: argparse.Namespace,
    winner: Setting,
    first: Setting,
    rungs: Sequence[Mapping[Setting, Score]],
    key: str,
    rate: float,
) -> str:
    groups = [("measured briefly", "soft"), ("longer", "s1"), ("at length", "s0")]
    series = []
    for (name, style), rung in zip(groups, rungs, strict=True):
        points = [(s.in_time, s.latency) for s in rung.values() if s.latency < 1e9]
        series.append(Series(name, points, style, joined=False))
    score = rungs[-1][winner]
    series.append(Series("chosen", [(score.in_time, score.latency)], "s2", joined=False))
    objective: slo.Objective = args.slo
    x = charts.linear("answers in time, requests/s", [p[0] for one in series for p in one.points], charts.number)
    latencies = [p[1] for one in series for p in one.points]
    y = charts.logarithmic(f"p{100 * objective.q:g} in the easy half", [*latencies, objective.seconds], charts.duration)
    guide = charts.Guide(objective.seconds, str(objective))
    plot = charts.lines("Trade-off: each mark is a setting", x, y, series, [guide], "trade-off")
    header = [*GRID, "in time", "latency", ""]
    rows = []
    for setting, score in sorted(rungs[-1].items(), key=lambda item: -item[1].in_time):
        mark = "chosen" if setting == winner else "present" if setting == first else ""
        rows.append([*(str(value) for _, value in setting), f"{score.in_time:,.0f}/s", ms(score.latency), mark])
    return page.page(
        f"Tuning {args.model}",
        f"{key}; each setting was offered {RAMP[0] * rate:,.0f} to {RAMP[1] * rate:,.0f} requests/s",
        [page.plots(plot), page.section("Measured at length", page.table(header, rows))],
    )


def _lengths(text: str) -> list[float]:
    found = [_seconds(part) for part in text.split(",")]
    if len(found) != len(RUNGS):
        raise argparse.ArgumentTypeError(f"expected {len(RUNGS)} times in seconds, got {text}")
    return found


def _values(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between them, got {text}") from None
