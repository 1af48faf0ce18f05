"""What the programs in `verifiers/` send and must get back, and what they must have counted.

They get a folder: NAME.request, NAME.response (of ModelInfer) and NAME.streamed (of ModelStreamInfer), each a whole
message whose id is MARK, in place of which a program puts a number of its own. What needs a file that is not there is
left out. They print, as JSON, how often each of
their checks came to which outcome: "answered" (the very bytes), "wrong", or the number of a gRPC status.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tests.service import models

from forwardpass import protocol
from forwardpass.api import infer_stream

VERIFIERS = Path(__file__).parent / "verifiers"
MARK = "########"
MIB = 1 << 20
LARGE = {"large4": 4 * MIB, "large8": 8 * MIB, "large16": int(15.9 * MIB)}  # the last one fits max_message_bytes
TURNS = 300_000  # of `hold`, of about a microsecond: far beyond the deadlines that the programs give it
CANCELLED, DEADLINE_EXCEEDED, NOT_FOUND, RESOURCE_EXHAUSTED, UNIMPLEMENTED = "1", "4", "5", "8", "12"


def make(folder: Path) -> tuple[Path, Path]:
    """A repository of models and the folder of messages."""
    repository, files = folder / "models", folder / "messages"
    files.mkdir(parents=True)
    models.save(repository, "echo", models.echo(shape=("batch", "width")))
    models.save(repository, "hold", models.hold())
    random = np.random.default_rng(1)
    for i in range(8):
        _write(files, f"small{i}", "echo", random.standard_normal((i + 1, 16), dtype=np.float32))
    for name, nbytes in LARGE.items():
        _write(files, name, "echo", random.standard_normal((1, nbytes // 4), dtype=np.float32))
    _write(files, "slow", "hold", np.full((1, 1), TURNS, np.float32))
    _write(files, "missing", "nobody", np.zeros((1, 1), np.float32))
    _write(files, "oversized", "echo", np.zeros((1, 17 * MIB // 4), np.float32))
    return repository, files


def _write(files: Path, name: str, model: str, x: np.ndarray[Any, Any]) -> None:
    request = protocol.ModelInferRequest(model_name=model, id=MARK, raw_input_contents=[x.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    response = protocol.ModelInferResponse(model_name=model, model_version="1", id=MARK)
    response.outputs.add(name="y", datatype="FP32", shape=x.shape)
    response.raw_output_contents.append(x.tobytes())
    (files / f"{name}.request").write_bytes(request.SerializeToString())
    (files / f"{name}.response").write_bytes(response.SerializeToString())
    (files / f"{name}.streamed").write_bytes(infer_stream.stream_response(response.SerializeToString()))


def without_large_streams(messages: Path) -> Path:
    """A copy of the messages for which the programs leave out their check of large messages on streams."""
    copy = messages.with_name("fewer")
    shutil.copytree(messages, copy, ignore=shutil.ignore_patterns("large*.streamed"), dirs_exist_ok=True)
    return copy


def faults(found: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """The checks that did not come to what they must."""
    allowed = {
        "deadlines": {DEADLINE_EXCEEDED},
        "cancels": {CANCELLED, "answered"},
        "missing model": {NOT_FOUND},
        "missing method": {UNIMPLEMENTED},
        "oversized": {RESOURCE_EXHAUSTED},
    }
    return {check: got for check, got in found.items() if got.keys() - allowed.get(check, {"answered"})}
