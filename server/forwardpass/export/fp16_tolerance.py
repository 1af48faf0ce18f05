"""Measures the error of half precision: runs a network with every rounding that a device makes, against float64.

ONNX Runtime's CPU provider does not show it: it computes a half-precision model in float32 and rounds at the end. So
the model is evaluated operator by operator in numpy: each result is rounded to half precision, products are summed in
float32 and rounded once, as tensor cores do. The contract's tolerance is derived from this error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from forwardpass.errors import ExportError
from forwardpass.export.fp16_conversion import LARGEST
from forwardpass.export.torch_network import TorchNetwork, Values
from forwardpass.model.contract import Tolerance, compare

# The allowed multiple of the largest measured error: devices sum in another order, and serve rows that were not tried.
MARGIN = 4.0
RELATIVE = 2.0**-8  # in addition, eight roundings (of 2^-11 each) of the output itself
LEAST = 1e-5  # the minimum: the tolerance of float32, in case half precision happens to be exact
# An output that is off by more than this fraction of the largest is considered wrong.
WORST = 2.0**-5


class _Gemm(OpRun):
    op_domain = ""

    def _run(
        self, a: Any, b: Any, c: Any = None, alpha: Any = None, beta: Any = None, transA: Any = None, transB: Any = None
    ) -> tuple[NDArray[Any]]:
        wide = _wide(a.T if transA else a) @ _wide(b.T if transB else b) * np.float32(alpha)
        return ((wide if c is None else wide + _wide(c) * np.float32(beta)).astype(a.dtype),)


class _MatMul(OpRun):
    op_domain = ""

    def _run(self, a: Any, b: Any) -> tuple[NDArray[Any]]:
        return ((_wide(a) @ _wide(b)).astype(a.dtype),)


_Gemm.__name__, _MatMul.__name__ = "Gemm", "MatMul"  # the evaluator finds operators by class name


def _wide(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float32) if array.dtype == np.float16 else array


class Rounded:
    """A half-precision model, evaluated with all its roundings."""

    def __init__(self, model: bytes) -> None:
        self._proto = onnx.load_model_from_string(model)
        self._evaluator = ReferenceEvaluator(self._proto, new_ops=[_Gemm, _MatMul])
        self._names = [value.name for value in self._proto.graph.output]

    def run(self, values: Values) -> dict[str, NDArray[Any]]:
        """The outputs by name."""
        with np.errstate(all="ignore"):  # overflows become infinite, and are found when outputs are compared
            answers = self._evaluator.run(None, dict(values))
        return dict(zip(self._names, answers, strict=True))

    def first_overflow(self, values: Values) -> str:
        """A description of the first tensor that becomes infinite or NaN; '' if there is none."""
        with np.errstate(all="ignore"):
            known: Any = self._evaluator.run(None, dict(values), intermediate=True)
        for node in self._proto.graph.node:
            for name in node.output:
                found = known.get(name)
                if found is not None and found.dtype == np.float16 and not np.isfinite(found).all():
                    return f"{name.removesuffix('.half')!r} ({node.op_type})"
        return ""


def hold(
    model: bytes, network: TorchNetwork, trials: Iterable[Values], wanted: Tolerance | None
) -> tuple[Tolerance, float]:
    """The tolerance for a half-precision model, and the largest difference from the reference over all trials.

    `wanted`: the caller's tolerance, which is then checked. If None, the tolerance is measured: `MARGIN` times the
    largest difference. Raises ExportError if the network overflows, loses too much, or an output is off.
    """
    rounded = Rounded(model)
    pairs = [(values, rounded.run(values), network.expected(values)) for values in trials]
    errors: dict[str, float] = {}
    scales: dict[str, float] = {}
    for values, got, expected in pairs:
        for name, want in expected.items():
            if want.dtype.kind != "f":
                continue
            finite = np.isfinite(want)
            if not np.isfinite(got[name][finite]).all():
                where = rounded.first_overflow(values) or f"output {name!r}"
                raise ExportError(
                    f"half precision: the network overflows: {where} goes beyond {LARGEST:.0f} for rows that "
                    "are right in float32; scale its features or its weights, or export it in float32"
                )
            apart = np.abs(got[name][finite].astype(np.float64) - want[finite])
            errors[name] = max(errors.get(name, 0.0), float(apart.max(initial=0.0)))
            scales[name] = max(scales.get(name, 0.0), float(np.abs(want[finite]).max(initial=0.0)))
    tolerance = wanted if wanted is not None else _measured(errors, scales)
    for _, got, expected in pairs:
        failure = compare(got, expected, tolerance).failure
        if failure is not None:
            raise ExportError(f"half precision: the network answers differently ({network.reference}): {failure}")
    return tolerance, max(errors.values(), default=0.0)


def _measured(errors: dict[str, float], scales: dict[str, float]) -> Tolerance:
    for name, error in errors.items():
        if error > max(LEAST, WORST * scales[name]):
            raise ExportError(
                f"half precision: output {name!r} is off by up to {error:.3g}, where answers reach {scales[name]:.3g}: "
                f"expected at most {WORST:.0%} of that; a tolerance of your own exports it nevertheless"
            )
    atol = max(LEAST, MARGIN * max(errors.values(), default=0.0))
    step = 10.0 ** (math.floor(math.log10(atol)) - 1)
    return Tolerance(rtol=RELATIVE, atol=float(f"{math.ceil(atol / step) * step:.2g}"))
