"""`forwardpass export`: exports a network in a Python file and its weights to a version in a model repository.

Only the arguments and the printed report; the work is in `checkpoint` and `exporter`, imported when the command runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forwardpass.client.arrays import TensorInfo
from forwardpass.console import array_files
from forwardpass.errors import ExportError
from forwardpass.export.user_code import is_estimator, look_up
from forwardpass.model.contract import Tolerance

if TYPE_CHECKING:
    from forwardpass.export.contract_parts import ExportedModel


PICKLES = (".joblib", ".pkl", ".pickle")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("network", metavar="FILE.py:NAME",
        help="the class of the network, a function that makes it, or the network; or package.module:NAME; or a fitted "
        "estimator of scikit-learn's kind, by name or as a .joblib or .pkl file")  # fmt: skip
    add("--weights", type=Path, metavar="FILE", help="its state dict, as torch.save writes it; every class needs one")
    add(
        "--key",
        default="",
        metavar="KEY",
        help="where in that file they are, if not under a usual key, as in 'ema.net'",
    )
    add("--unsafe-pickle", action="store_true",
        help="read that file even where it holds more than tensors, such as a pickled network; this runs whatever code "
        "it names, so only for files that you trust")  # fmt: skip
    add("--input", action="append", default=[], dest="inputs", metavar="NAME:DTYPE[DIM,...]",
        help="an input, as in 'x:float32[batch,64]'; a word stands for any size; once for each input; an estimator of "
        "a matrix needs none")  # fmt: skip
    add("--samples", type=Path, metavar="FILE",
        help="rows to check the export on and to put into the contract: .npz or .json by input, .npy or .csv of the "
        "only input; without it they are drawn at random")  # fmt: skip
    add("--output", action="append", dest="outputs", metavar="NAME", help="an output's name; once for each output")
    add("--labels", action="append", metavar="[TENSOR=]A,B,C|FILE",
        help="what the places of a tensor's last axis stand for: an output's classes, an input's columns; words, or a "
        "file with one a line; the output's without a name")  # fmt: skip
    add("--categories", action="append", metavar="INPUT=A,B,C|FILE",
        help="what the values 0, 1, ... of an input of integers stand for: clients send the words")  # fmt: skip
    add("--args", metavar="JSON", help="the constructor's arguments, as one JSON object")
    add("--arg", action="append", default=[], metavar="KEY=VALUE",
        help="one argument of the constructor; the value is read as JSON where it is JSON, else as text")  # fmt: skip
    add("--name", required=True, help="the model's name")
    add("--repository", type=Path, required=True, metavar="DIR", help="the model repository; made where it is missing")
    add("--version", type=int, metavar="N", help="the version's number (default: the next free one)")
    add("--opset", type=int, default=20, metavar="N", help="the ONNX operator set (default: %(default)s)")
    add("--expose-hidden", action="store_true",
        help="make the activations between layers outputs too, a1, a2 ..., for those who ask for them")  # fmt: skip
    add("--precision", choices=("native", "fp16"), default="native",
        help="native: as the network computes; fp16: a float32 network's layers in half precision, for GPUs; inputs "
        "and outputs stay float32 (default: %(default)s)")  # fmt: skip
    by_precision = "default: by the network's precision, {:g} for float32; measured for fp16"
    add("--rtol", type=float, help=f"relative tolerance of the answers ({by_precision.format(1e-4)})")
    add("--atol", type=float, help=f"absolute tolerance of the answers ({by_precision.format(1e-5)})")


def run(args: argparse.Namespace) -> int:
    """Export, and print a report. Returns the exit status. Raises ExportError."""
    arguments = _constructor_arguments(args.args, args.arg)
    tolerance = _tolerance(args.rtol, args.atol)
    labels = _words("--labels", args.labels or [])
    categories = _words("--categories", args.categories or [])
    if isinstance(categories, list):
        raise ExportError(f"--categories {args.categories[0]!r}: expected INPUT=WORDS")
    found = None
    try:
        estimator = _estimator(args) if Path(args.network).suffix in PICKLES else None
        if estimator is None:
            found = look_up(args.network)
            estimator = found.value if is_estimator(found.value) else None
        if estimator is not None:
            print(report(_export_estimator(args, estimator, tolerance)))
            return 0
    finally:
        _say("")
    if not args.inputs:
        raise ExportError("--input: expected each input of the network, as in 'x:float32[batch,64]'")
    _say("loading torch")
    try:
        from forwardpass.export import checkpoint, exporter
    except ImportError as error:
        _say("")
        raise ExportError(f"{error.name} is missing: pip install 'forwardpass[train,cpu]'") from error
    try:
        network, is_class = checkpoint.build(args.network, arguments, found)
        if args.weights is not None:
            checkpoint.load_weights(network, args.weights, args.key, args.unsafe_pickle)
        elif is_class:
            raise ExportError(f"{args.network} is a class, whose weights would be random: give --weights FILE")
        exported = exporter.export(
            network,
            args.inputs,
            args.name,
            args.repository,
            version=args.version,
            outputs=args.outputs,
            labels=labels,
            categories=categories,
            opset=args.opset,
            tolerance=tolerance,
            samples=None if args.samples is None else _samples(args.samples, args.inputs),
            expose_hidden=args.expose_hidden,
            precision=args.precision,
            progress=_say,
        )
    finally:
        _say("")
    print(report(exported))
    return 0


def _estimator(args: argparse.Namespace) -> Any:
    """The estimator in a file of joblib or pickle. Raises ExportError."""
    if not args.unsafe_pickle:
        raise ExportError(
            f"{args.network}: is a pickle, which runs whatever code it names; if you trust it, add --unsafe-pickle"
        )
    return _estimators().unpickle(Path(args.network))


def _estimators() -> Any:
    """The module for estimators. Raises ExportError where what it needs is not installed."""
    try:
        from forwardpass.export import estimator
    except ImportError as error:
        raise ExportError(f"{error.name} is missing: pip install 'forwardpass[estimators,cpu]'") from error
    return estimator


def _export_estimator(args: argparse.Namespace, estimator: Any, tolerance: Tolerance | None) -> ExportedModel:
    given = {
        "--weights": args.weights, "--args": args.args, "--arg": args.arg, "--output": args.outputs,
        "--labels": args.labels, "--categories": args.categories, "--expose-hidden": args.expose_hidden,
        "--precision": args.precision != "native",
    }  # fmt: skip
    useless = ", ".join(option for option, value in given.items() if value)
    if useless:
        raise ExportError(f"{useless}: not for an estimator, whose outputs are its predict's and predict_proba's")
    inputs = args.inputs or [str(spec) for spec in _estimators().own_inputs(estimator)]
    exported: ExportedModel = _estimators().export_estimator(
        estimator,
        args.name,
        args.repository,
        inputs=inputs,
        version=args.version,
        opset=args.opset,
        tolerance=tolerance,
        samples=None if args.samples is None else _samples(args.samples, inputs),
        progress=_say,
    )
    return exported


def _samples(path: Path, inputs: Sequence[str]) -> dict[str, Any]:
    """The rows in a file, by input. Raises ForwardpassError where it cannot be read."""
    from forwardpass.export.input_spec import parse_inputs

    specs = [spec.tensor() for spec in parse_inputs(inputs, text=True)]
    tensors = [TensorInfo(spec.name, spec.datatype, tuple(spec.shape)) for spec in specs]
    return dict(array_files.read(path, sys.stdin, tensors))


def report(exported: ExportedModel) -> str:
    """A report of the written version, in a few lines."""
    contract = exported.contract
    tolerance = contract.tolerance
    half = contract.precision == "fp16"
    lines = [
        f"wrote {exported.path}",
        f"  inputs       {_tensors(contract.inputs)}",
        f"  outputs      {_tensors(contract.outputs)}",
        *([f"  hidden       {_tensors(contract.hidden)}"] if contract.hidden else []),
        f"  opset        {contract.opset}",
        *(["  precision    fp16 from the first product on; inputs and outputs float32"] if half else []),
        f"  parameters   {exported.parameters:,}",
        f"  difference   {contract.largest_difference:.3g} at most from PyTorch in {contract.reference}, over batches "
        f"of many sizes (allowed: {tolerance.atol:g} + {tolerance.rtol:g} x |expected|)",
    ]
    if contract.batch_invariant is None:
        lines.append("  batch        none: the inputs share no symbolic axis 0")
    elif contract.batch_invariant:
        lines.append("  batch        invariant: a row's answer is the same, bit for bit, alone and in a batch")
    else:
        mixes = "its last bits depend" if contract.rows_independent else "it depends"
        lines.append(
            f"  batch        not invariant: a row's answer is not the same alone and in a batch: {mixes} on the other "
            f"rows, by up to {exported.row_difference:.3g}"
        )
    lines += [f"  doubt        {doubt}" for doubt in exported.doubts]
    return "\n".join(lines)


def _tensors(tensors: Sequence[Any]) -> str:
    return ", ".join(
        f"{tensor.name} {tensor.datatype} [{', '.join('any' if size == -1 else str(size) for size in tensor.shape)}]"
        for tensor in tensors
    )


def _constructor_arguments(text: str | None, pairs: Sequence[str]) -> dict[str, Any]:
    arguments: Any = {}
    if text is not None:
        try:
            arguments = json.loads(text)
        except ValueError as error:
            raise ExportError(f"--args {text!r}: is not JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise ExportError(f"--args {text!r}: expected a JSON object, as in '{{\"hidden\": 64}}'")
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ExportError(f"--arg {pair!r}: expected KEY=VALUE, as in 'hidden=64'")
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    return dict(arguments)


def _tolerance(rtol: float | None, atol: float | None) -> Tolerance | None:
    if rtol is None and atol is None:
        return None
    if rtol is None or atol is None:
        raise ExportError("--rtol and --atol: give both or neither; what is allowed is atol + rtol x |expected|")
    if not (0 <= rtol < 1 and 0 <= atol < float("inf")):
        raise ExportError(f"--rtol {rtol} --atol {atol}: expected 0 <= rtol < 1, and atol from 0")
    return Tolerance(rtol=rtol, atol=atol)


def _words(option: str, given: Sequence[str]) -> list[str] | dict[str, list[str]] | None:
    """By tensor, or of the only one without a name."""
    by_tensor: dict[str, list[str]] = {}
    for text in given:
        tensor, equals, words = text.rpartition("=")
        path = Path(words)
        try:
            by_tensor[tensor] = path.read_text("utf-8").splitlines() if path.is_file() else words.split(",")
        except (OSError, UnicodeDecodeError) as error:
            raise ExportError(f"{option} {text!r}: cannot be read: {error}") from None
        if tensor == "" and (equals or len(given) > 1):
            raise ExportError(f"{option} {text!r}: expected OUTPUT=LABELS, as several are given")
    return by_tensor.get("", by_tensor) if by_tensor else None


def _say(stage: str) -> None:
    """Show the current stage on a terminal, in one line that the next stage replaces; '' removes it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{stage}", end="", file=sys.stderr, flush=True)
