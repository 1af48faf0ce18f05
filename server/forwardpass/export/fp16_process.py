"""`python -m forwardpass.export.fp16_process FOLDER`: native.onnx in it to half precision, written and tried there.

A process of its own, since ONNX Runtime has crashed on converted networks; opening one takes its optimizers, and shape
inference is native code too.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import ExportError
from forwardpass.execution.onnx_runtime import ort
from forwardpass.export.child_process import run_step, serve_parent
from forwardpass.export.fp16_conversion import halve

NATIVE, HALF, ROWS = "native.onnx", "half.onnx", "rows.npz"


def halve_apart(model: bytes, rows: Mapping[str, NDArray[Any]]) -> bytes:
    """`halve` in a process of its own, in which ONNX Runtime then runs `rows`, by input. Raises ExportError."""
    with tempfile.TemporaryDirectory(prefix="forwardpass-fp16-") as name:
        folder = Path(name)
        (folder / NATIVE).write_bytes(model)
        np.savez(folder / ROWS, allow_pickle=False, **{f"input {key}": value for key, value in rows.items()})
        run_step("forwardpass.export.fp16_process", [folder], "half precision")
        return (folder / HALF).read_bytes()


def convert(folder: Path, begin: Callable[[str], None]) -> None:
    """The child's work. `begin` is called with each stage. Raises ExportError."""
    begin("converting the network")
    half = halve((folder / NATIVE).read_bytes())
    (folder / HALF).write_bytes(half)
    begin("opening the converted network in ONNX Runtime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    with np.load(folder / ROWS, allow_pickle=False) as arrays:
        rows = {key.removeprefix("input "): arrays[key] for key in arrays.files}
    try:
        session = ort.InferenceSession(half, options, providers=["CPUExecutionProvider"])
        begin("running the converted network in ONNX Runtime")
        session.run(None, rows)
    except Exception as error:
        said = " ".join(str(error).split())
        raise ExportError(f"half precision: ONNX Runtime refuses the converted network: {said}") from None


if __name__ == "__main__":
    sys.exit(serve_parent(lambda begin: convert(Path(sys.argv[1]), begin)))
