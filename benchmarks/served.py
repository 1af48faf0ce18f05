"""What the benchmark serves: repositories of networks, the rows that are sent to them, and the answers that are right.

The right answers are ONNX Runtime's own, each row run alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

import harness
import mlp_file

BIG = (1024, 4096, 4096, 1000)  # widths of the large network
TWELVE = tuple(f"net-{i:02}" for i in range(12))  # networks of digits' widths, each with weights of its own
DIGITS_WIDTHS = (64, 256, 256, 10)
RECIPES = ("digits", "mnist")


def repository(folder: Path, name: str) -> Path:
    """A new repository in `folder`: of a recipe, of the "twelve" or of the "big" network."""
    if name in RECIPES:
        return harness.repository(folder, [name])
    networks = {net: (DIGITS_WIDTHS, i) for i, net in enumerate(TWELVE)} if name == "twelve" else {"big": (BIG, 0)}
    for net, (widths, seed) in networks.items():
        mlp_file.write(folder / net / "1" / "model.onnx", mlp_file.layers(widths, seed))
    return folder


def model_file(repository: Path, model: str) -> Path:
    (path,) = (repository / model).glob("*/model.onnx")
    return path


@dataclass(frozen=True, slots=True)
class Samples:
    """Distinct requests: `rows` [N, B, D_in] and the right `answers` [N, B, D_out] of the models in turn."""

    rows: NDArray[np.float32]
    answers: NDArray[np.float32]


@functools.cache
def samples(repository: Path, models: tuple[str, ...], rows_each: int, count: int) -> Samples:
    sessions = [_session(model_file(repository, model)) for model in models]
    rows = _rows(models[0], sessions[0].get_inputs()[0].shape[1], count * rows_each)
    answers = []
    for i in range(count):
        session = sessions[i % len(sessions)]
        mine = rows[i * rows_each : (i + 1) * rows_each]
        answers.append(np.concatenate([session.run(None, {"x": row[None]})[0] for row in mine]))
    return Samples(rows.reshape(count, rows_each, -1), np.stack(answers))


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _rows(model: str, width: int, count: int) -> NDArray[np.float32]:
    """Held-out rows of a recipe with a little noise, so that no two are equal; of other networks noise alone."""
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((count, width), np.float32)
    if model not in RECIPES:
        return noise
    held_out = harness.held_out(model)
    chosen: NDArray[np.float32] = held_out[np.arange(count) % len(held_out)].astype(np.float32)
    return chosen + noise * np.float32(0.01)
