"""`forwardpass predict`: send rows, or a table, from files to a served model, and print or save what it answers."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.cli import bulk, ranking
from forwardpass.client import Answer, Client, ModelInfo, TensorInfo, Timings
from forwardpass.console import arguments, array_files, connection_options, table_files
from forwardpass.console.row_reader import READ_BYTES, ArrayRows, CsvRows, NpyRows, RowSource
from forwardpass.console.row_writer import CsvFormat, NpyFormat, RowFormat, RowWriter
from forwardpass.errors import ForwardpassError

_SHOWN_ROWS = 20
_SHOWN_COLUMNS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="the model's name")
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="[NAME=]FILE",
        help="rows for an input: .npy, .npz, .csv, .json, or - for JSON on stdin; NAME may be left out where the file "
        "has the names or the model has one input; or a table of the model's columns: .csv with a header, .parquet, "
        "records in .json, .jsonl or on stdin",
    )
    parser.add_argument("--output", action="append", metavar="NAME", help="only this output; may be repeated")
    parser.add_argument(
        "--top",
        type=arguments.count,
        metavar="K",
        help="the K largest values of each row by their labels, with probabilities; --save takes .csv or .json",
    )
    parser.add_argument(
        "--softmax",
        action=argparse.BooleanOptionalAction,
        help="with --top, take the softmax of the output's values [of an output with logit in its name]",
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the answer as .npy, .npz, .csv or .json")
    parser.add_argument("--version", default="", help="the model's version; left out, the server chooses")
    parser.add_argument(
        "--in-flight",
        type=arguments.count,
        default=bulk.IN_FLIGHT,
        metavar="N",
        help="requests under way at once, for more rows than go in one [%(default)s]",
    )
    parser.add_argument(
        "--chunk-rows",
        type=arguments.count,
        metavar="N",
        help="rows of one request, where there are more [what the server's limits and a MiB allow]",
    )
    parser.add_argument("--timings", action="store_true", help="show where the server spent the time")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    connection_options.add_call_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Raises ForwardpassError, whose text is one line."""
    with connection_options.client_of(args) as client:
        return _predict(client, args)


def _predict(client: Client, args: argparse.Namespace) -> int:
    info = client.metadata(args.model, version=args.version)
    stdin = io.StringIO(sys.stdin.read() if any(_file_of(text, info)[0] == Path("-") for text in args.input) else "")
    table = _table(args.input, info, stdin)
    sources = None
    if not args.timings and bulk.divisible(info):
        sources = _row_sources(args.input, info) if table is None else _sources_of(table, info)
    if sources is not None:
        answers = _in_chunks(client, info, sources, args)
        how = None if args.save is None or args.json or args.top else _row_format(args.save, info, args.output)
        if how is not None:
            return _save_rows(answers, args.save, how)
        answer = _together(answers, info)
    else:
        inputs = _as_rows(info, _inputs(args.input, info, stdin)) if table is None else table
        answer = client.infer(args.model, inputs, version=args.version, outputs=args.output, timings=args.timings)
    if args.top is not None:
        ranking.show(answer, args)
        return 0
    if args.save is not None:
        array_files.save(args.save, answer, {name: answer.labels(name) for name in answer})
    if args.json:
        print(json.dumps(_as_json(answer), ensure_ascii=False))
    elif args.save is not None:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in answer.items())
        print(f"wrote {args.save}: {shapes}, from {answer.model} version {answer.version}")
    else:
        print(f"{answer.model} version {answer.version}")
        for name, array in answer.items():
            print()
            print(f"{name} {array.dtype} {list(array.shape)}")
            print(_table_of(array, answer.labels(name)))
    if answer.timings is not None and not args.json:
        print()
        print(_told(answer.timings))
    return 0


def _table(given: Sequence[str], info: ModelInfo, stdin: io.StringIO) -> array_files.Arrays | None:
    """The inputs that a file of the model's columns makes; None: it is none, or there are several files."""
    if len(given) != 1:
        return None
    path, tensors = _file_of(given[0], info)
    return table_files.read_table(path, stdin, info.name, tensors)


def _sources_of(table: array_files.Arrays, info: ModelInfo) -> bulk.Sources | None:
    sources: dict[str, RowSource] = {name: ArrayRows(array) for name, array in table.items()}
    rows = len(next(iter(table.values())))
    return sources if rows > min(bulk.request_rows(info, sources), bulk.CHUNK_ROWS) else None


def _row_sources(given: Sequence[str], info: ModelInfo) -> bulk.Sources | None:
    """Where the rows come from, by input, if they are to be sent in chunks; None: they go in one request."""
    sources: dict[str, RowSource] = {}
    large = False
    for text in given:
        path, tensors = _file_of(text, info)
        if len(tensors) != 1 or path.suffix.lower() not in (".npy", ".csv") or not path.is_file():
            return None
        (tensor,) = tensors
        # How many rows a CSV file has is not known before its end.
        large = large or path.suffix.lower() == ".csv" or path.stat().st_size > READ_BYTES
        if tensor.name in sources:
            return None
        sources[tensor.name] = source = NpyRows(path) if path.suffix.lower() == ".npy" else CsvRows(path, tensor)
        if len(source.row_shape) != len(tensor.shape) - 1:
            return None  # a single row, or what the server refuses
    if sources.keys() != info.input_named.keys():
        return None
    known = [source.rows for source in sources.values() if source.rows is not None]
    return sources if large or any(rows > bulk.request_rows(info, sources) for rows in known) else None


def _in_chunks(client: Client, info: ModelInfo, sources: bulk.Sources, args: argparse.Namespace) -> Iterator[Answer]:
    rows = args.chunk_rows or bulk.chunk_rows(info, sources, args.output)
    return bulk.answers(
        client, info, sources, rows, in_flight=args.in_flight, version=args.version, outputs=args.output
    )


def _row_format(path: Path, info: ModelInfo, outputs: list[str] | None) -> RowFormat | None:
    """How a file is written row by row; None: it can't be, or the outputs do not fit it."""
    wanted = [tensor for tensor in info.outputs if outputs is None or tensor.name in outputs]
    if len(wanted) != 1:
        return None
    (tensor,) = wanted
    if path.suffix.lower() == ".csv":
        return CsvFormat(tensor.name, tensor.labels)
    return NpyFormat() if path.suffix.lower() == ".npy" and tensor.datatype != "BYTES" else None


def _save_rows(answers: Iterator[Answer], path: Path, how: RowFormat) -> int:
    with RowWriter(path, how) as writer:
        try:
            for answer in answers:
                writer.write(answer.only())
        except ForwardpassError as error:
            if not writer.count:
                raise
            raise ForwardpassError(f"{error}; {writer.partial} has the {writer.count} rows before") from None
    (name,) = answer
    shape = [writer.count, *writer.row_shape]
    print(f"wrote {path}: {name} {shape}, from {answer.model} version {answer.version}")
    return 0


def _together(answers: Iterator[Answer], info: ModelInfo) -> Answer:
    found = list(answers)
    arrays = {name: np.concatenate([answer[name] for answer in found]) for name in found[0]}
    return Answer(arrays, info, found[0].model, found[0].version, "", None)


def _file_of(text: str, info: ModelInfo) -> tuple[Path, tuple[TensorInfo, ...]]:
    """The file of an --input, and the inputs that it may have."""
    name, named, path = text.partition("=")
    if not named or Path(text).exists():
        return Path(text), info.inputs
    if name not in info.input_named:
        expected = ", ".join(info.input_named)
        raise ForwardpassError(f"--input {text}: model '{info.name}' has no input '{name}'; expected {expected}")
    return Path(path), (info.input_named[name],)


def _inputs(given: Sequence[str], info: ModelInfo, stdin: io.StringIO) -> array_files.Arrays:
    arrays: array_files.Arrays = {}
    for text in given:
        path, tensors = _file_of(text, info)
        for found, array in array_files.read(path, stdin, tensors).items():
            if found in arrays:
                raise ForwardpassError(f"--input {text}: input '{found}' is given twice")
            arrays[found] = array
    return arrays


def _as_rows(info: ModelInfo, arrays: array_files.Arrays) -> array_files.Arrays:
    """The inputs as [B, ...]: adds the batch axis to a single row given without it."""
    if all(array.ndim == len(info.input_named[name].shape) - 1 for name, array in arrays.items()):
        return {name: array[np.newaxis] for name, array in arrays.items()}
    return arrays


def _as_json(answer: Answer) -> dict[str, Any]:
    said: dict[str, Any] = {
        "model": answer.model,
        "version": answer.version,
        "outputs": {name: array_files.plain(array) for name, array in answer.items()},
    }
    labels = {name: list(answer.labels(name)) for name in answer if answer.labels(name)}
    if labels:
        said["labels"] = labels
    if answer.timings is not None:
        said["timings"] = {key: getattr(answer.timings, key) for key in answer.timings.__slots__}
    return said


def _told(timings: Timings) -> str:
    said = [
        f"{what} {value:.0f} µs"
        for what, value in (("queue", timings.queue_us), ("run", timings.run_us), ("total", timings.total_us))
        if value is not None
    ]
    if timings.batch_rows is not None:
        said.append(f"in a matrix of {timings.batch_rows} rows")
    return "server: " + (", ".join(said) or "does not send its timings")


def _table_of(array: NDArray[Any], labels: Sequence[str]) -> str:
    """One output as text: one line per row; if there are labels, that of the largest value comes first."""
    if array.ndim > 2 or array.size == 0:
        return np.array2string(array, threshold=_SHOWN_ROWS * _SHOWN_COLUMNS)
    rows = array.reshape(len(array) if array.ndim else 1, -1)
    places = min(rows.shape[1], _SHOWN_COLUMNS)
    more = ["…"] if rows.shape[1] > places else []
    ranked = len(labels) == rows.shape[1] and rows.dtype.kind in "iuf"
    header = ["row", *(["largest"] if ranked else []), *(labels[:places] or map(str, range(places))), *more]
    lines = [header]
    for number, row in enumerate(rows[:_SHOWN_ROWS]):
        first = [str(number)]
        if ranked:
            first.append("NaN" if row.dtype.kind == "f" and np.isnan(row).any() else labels[int(row.argmax())])
        lines.append([*first, *map(_cell, row[:places]), *more])
    text = _aligned(lines)
    if len(rows) > _SHOWN_ROWS:
        text += f"\n… {len(rows) - _SHOWN_ROWS} more rows: --save FILE or --json for all"
    return text


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, np.floating) else str(value)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
