"""`forwardpass tune`: measure which options let a model answer the most requests in time.

All candidates are models in one real server process, so that none needs a server start; the first is the model as it
is, with the server's effective options. The server has the settings in the environment, TLS and tokens too. The
open-loop client offers each a load that ramps up past its capacity, with the objective as deadline; candidates are
ranked by the number of responses in time. A state file keeps every measurement, so a second run continues where the
first ended. Options are written only if better beyond the noise.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from forwardpass.client import Access
from forwardpass.console import arguments, connection_options
from forwardpass.errors import LoadTestError, ModelError
from forwardpass.loadtest import objective_search, options_file, request_bodies, successive_halving
from forwardpass.loadtest.command import objective
from forwardpass.loadtest.generator import fleet, histogram
from forwardpass.loadtest.generator.schedule import Phase
from forwardpass.loadtest.measurement import ms
from forwardpass.loadtest.report import charts, page
from forwardpass.loadtest.report.charts import Series
from forwardpass.loadtest.successive_halving import RUNGS, Rung, Sample, Score, Setting
from forwardpass.loadtest.target import LoadClient, LoadTarget
from forwardpass.model import triton_config
from forwardpass.model.options import ModelConfig
from forwardpass.repository.model_folder import ModelFolder
from forwardpass.testing.server_process import ServerProcess

GRID = {
    "max_batch_size": (16, 64, 256),
    "instances": (1, 2),
    "intra_op_threads": (1, 2),
    "max_queue_delay_us": (0, 200, 1000),
}
RAMP = 0.3, 1.3  # ramp relative to the present setting's closed-loop throughput: from easy to overload
PRESENT = "present"  # name of the unchanged model among the candidates
_CLOSED = 128  # requests in flight in that closed loop
_WARM_UP = 0.25  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model of the repository")
    parser.add_argument("--slo", type=objective, required=True, metavar="p99=5ms", help="the objective")
    parser.add_argument("--repository", type=Path, default=Path("models"), metavar="FOLDER", help="[%(default)s]")
    parser.add_argument("--rows", type=arguments.count, default=1, metavar="N", help="rows of a request [%(default)s]")
    for name, values in GRID.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=_values, default=values, metavar="N,N", help=f"[{','.join(map(str, values))}]")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the winner's options [the model's own file]")
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
    connection_options.add_arguments(parser)


@dataclasses.dataclass(slots=True)
class _State:
    """The measurements so far, kept in a file. `scores`: [responses in time a second, latency in seconds, seconds the
    measurement took] by `_key`: the setting, rung and turn as text."""

    path: Path
    key: str  # the model, objective, rows and present options; a different key starts afresh
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
        """Seconds spent measuring these settings on these rungs, in this run or an earlier one."""
        by_rung = [(setting, length) for rung, length in zip(rungs, lengths, strict=True) for setting in rung]
        return sum(self.scores[_key(*of, turn)][2] for of in by_rung for turn in range(of[1].repeats))


def run(args: argparse.Namespace) -> int:
    """Measure what the state lacks, write options that are better, and the report. Raises LoadTestError."""
    model_folder = ModelFolder(args.model, args.repository / args.model)
    try:
        config = model_folder.config()
        versions = model_folder.chosen(config)
    except ModelError as error:
        raise LoadTestError(f"{model_folder.folder}: {error}") from None
    options = {name: getattr(args, name) for name in GRID}
    settings = successive_halving.grid(options)
    with fleet.unwinding(), tempfile.TemporaryDirectory(prefix="forwardpass-tune-") as made:
        names = _repository(Path(made), model_folder, versions, settings)
        with _on(args.server_core):
            started = ServerProcess(Path(made), "--log-level", "warning", patience=600.0)
        with started as server:
            first = _as_it_runs(server.address, config, connection_options.access_of(args))
            settings = [first, *[setting for setting in settings if setting != first]]
            key = f"{args.model} version {max(versions)}, {args.slo}, {args.rows} row(s), present {_words(first)}"
            state = _State.open(args.state or Path(f"tune-{args.model}.json"), key)
            bench = _Bench(server, {**names, first: PRESENT}, state, args)
            lengths = [Rung(s, rung.repeats) for s, rung in zip(args.seconds, RUNGS, strict=True)]
            rungs = successive_halving.search(settings, bench.measure, lengths)
            whole = successive_halving.measured(settings, bench.measure, lengths[-1]) if args.exhaustive else {}
    winner = successive_halving.choose(rungs[-1], first)
    spent = state.spent(rungs, lengths)
    print(_told(winner, first, rungs, spent))
    if whole:
        print(_compared(winner, whole, spent, state.spent([whole], lengths[-1:])))
    if winner == first:
        print("nothing is written: no setting is better than the present one by more than the noise")
    else:
        print(
            f"wrote {_write(model_folder.folder, args.output, winner, comment(winner, rungs, key, state.rate, spent))}"
        )
    if args.report:
        args.report.write_text(_html(args, winner, first, rungs, key, state.rate), "utf-8")
    return 0


def _as_it_runs(address: str, config: ModelConfig, access: Access) -> Setting:
    """The present setting as the server runs it, with the server's own choice for each option that is not set."""
    found = request_bodies.model_config(address, PRESENT, access)
    threads = config.intra_op_threads or 1  # without the option, the server gives a run one
    delay = config.max_queue_delay_us
    chosen = (max(1, found.max_batch_size), max(1, sum(g.count for g in found.instance_group)), threads, delay)
    return tuple(zip(GRID, chosen, strict=True))


def _repository(
    made: Path, model_folder: ModelFolder, versions: Mapping[int, Path], settings: Sequence[Setting]
) -> dict[Setting, str]:
    """Create a repository with the unchanged model, named PRESENT, and a model for each setting; their names."""
    others = {folder.name for folder in model_folder.folder.iterdir() if folder.name.isdecimal()}
    others -= {folder.name for folder in versions.values()}
    path = options_file.path_of(model_folder.folder)
    text = _text(path)
    if path.name == triton_config.FILE_NAME:
        text = options_file.nameless(text)
    names = {setting: f"candidate-{number:03d}" for number, setting in enumerate(settings)}
    for setting, name in [((), PRESENT), *names.items()]:
        # Hard links: the weights are stored once.
        shutil.copytree(
            model_folder.folder,
            made / name,
            copy_function=_link,
            ignore=lambda at, _: _ignored(model_folder, at, others),
        )
        if path.exists() or setting:
            written = options_file.edited(text, path.name, dict(setting)) if setting else text
            (made / name / path.name).write_text(written, "utf-8")
            options_file.check(made / name, dict(setting))
    return names


def _ignored(model_folder: ModelFolder, at: str, others: set[str]) -> set[str]:
    """Names not to copy: versions that are not served, and the options file, which each candidate has of its own."""
    return {*others, options_file.path_of(model_folder.folder).name} if Path(at) == model_folder.folder else set()


def _link(source: str, target: str) -> str:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # on another file system
        shutil.copy2(source, target)
    return target


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8") if path.exists() else ""
    except OSError as error:
        raise LoadTestError(f"{path}: cannot be read: {error.strerror or error}") from None


def _write(folder: Path, output: Path | None, winner: Setting, comment: Sequence[str]) -> Path:
    """Write the model's options with the winner's, keeping an existing file as .old. Returns the path."""
    own = options_file.path_of(folder)
    text = options_file.commented(options_file.edited(_text(own), own.name, dict(winner)), comment)
    path = output or own
    if path.exists():
        shutil.copy2(path, path.with_name(f"{path.name}.old"))
    path.write_text(text, "utf-8")
    return path


@contextlib.contextmanager
def _on(core: int | None) -> Iterator[None]:
    """Pin processes started within the context to that core; they also detect that it is their only one."""
    before = os.sched_getaffinity(0)
    try:
        if core is not None:
            os.sched_setaffinity(0, {core})
        yield
    finally:
        os.sched_setaffinity(0, before)


class _Bench:
    """Measures settings one at a time on one server."""

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

    def _target(self, setting: Setting, deadline: float | None) -> LoadTarget:
        address, name, args = self._server.address, self._names[setting], self._args
        access = connection_options.access_of(args)
        model = request_bodies.info(address, name, access=access)
        requests = request_bodies.make(model, "", {args.rows: 1.0}, None, 0)
        # A response this long after the deadline is late in any case: do not wait for it.
        client = LoadClient(core=args.core, deadline=deadline, warm_up=_WARM_UP, patience=0.25, access=access)
        return LoadTarget(address, name, requests, client, metrics_url="")

    def measure(self, setting: Setting, rung: Rung, turn: int) -> Sample:
        """A sample of a setting, from the state if it is already there."""
        state, objective = self._state, self._args.slo
        key = _key(setting, rung, turn)
        if key not in state.scores:
            began = time.monotonic()
            target = self._target(setting, objective.seconds)
            point = target.phases([Phase(rung.seconds, RAMP[0] * state.rate, RAMP[1] * state.rate)])
            # Latency is taken from the first half of the ramp: in the second it only reflects the queue length.
            easy = point.recording.latency[: point.recording.slices // 2].sum(axis=0)
            latency = histogram.quantile(easy, objective.q)
            # JSON has no nan: a setting without responses ranks last.
            state.scores[key] = [point.goodput, latency if latency == latency else 1e9, time.monotonic() - began]
            state.save()
            print(f"{key}: {point.goodput:,.0f}/s in time, {ms(latency)}", file=sys.stderr)
        return Sample(*state.scores[key][:2])


def _key(setting: Setting, rung: Rung, turn: int) -> str:
    return f"{_words(setting)} @ {rung.seconds:g} s #{turn + 1}"


def _words(setting: Setting) -> str:
    return " ".join(f"{name}={value}" for name, value in setting)


def comment(
    winner: Setting, rungs: Sequence[Mapping[Setting, Score]], key: str, rate: float, spent: float
) -> list[str]:
    """Comment lines for the options file with the reason for the winner's options."""
    today = datetime.datetime.now(datetime.UTC).date()
    lines = [
        f"{options_file.MARK}{today} by `forwardpass tune`: {key}.",
        f"# {len(rungs[0])} settings in {spent:.0f} s of measuring, each offered {RAMP[0] * rate:,.0f} to "
        f"{RAMP[1] * rate:,.0f} requests/s",
        "# with the objective as deadline. Answers in time a second, and latency in the easy half, best first:",
    ]
    for setting, score in sorted(rungs[-1].items(), key=lambda item: -item[1].in_time):
        mark = "  <- chosen" if setting == winner else ""
        lines.append(f"#   {score.in_time:>9,.0f}/s {ms(score.latency):>9}  {_words(setting)}{mark}")
    return lines


def _told(winner: Setting, first: Setting, rungs: Sequence[Mapping[Setting, Score]], spent: float) -> str:
    of_it, present = rungs[-1][winner], rungs[-1][first]
    counts = " -> ".join(str(len(rung)) for rung in rungs)
    measured = f"{counts} settings in {spent:.0f} s"
    said = f"{_words(winner)}: {of_it.in_time:,.0f} answers/s in time, {ms(of_it.latency)}"
    if winner == first:
        return f"{said}, as it is; {measured}"
    gain = f"{of_it.in_time / present.in_time - 1:+.0%} of" if present.in_time else "against"
    return f"{said}; {gain} the present setting's {present.in_time:,.0f}, {ms(present.latency)}; {measured}"


def _compared(winner: Setting, whole: Mapping[Setting, Score], spent: float, grid_seconds: float) -> str:
    """The winner against the whole grid, measured at length. The finalists' measurements count for both."""
    champion = successive_halving.best(whole)
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
    objective: objective_search.Objective = args.slo
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
    found = [arguments.seconds(part) for part in text.split(",")]
    if len(found) != len(RUNGS):
        raise argparse.ArgumentTypeError(f"expected {len(RUNGS)} times in seconds, got {text}")
    return found


def _values(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between them, got {text}") from None
