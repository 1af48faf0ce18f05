"""Networks on Intel's OpenVINO, by ONNX Runtime's provider of that name: pip install onnxruntime-openvino.

That package takes onnxruntime's place (each overwrites the other's files). OpenVINO computes on threads of its own and
takes the processor unless OPENVINO_DEVICE names another of its devices. Its plugins may round to fewer bits than the
network has, for speed: here they are asked not to, and the contract, replayed at load, finds out where they do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from forwardpass.execution.onnx_runtime import ort
from forwardpass.execution.ort_session import OrtSession
from forwardpass.execution.placement import OPENVINO, Devices, Placement

DEVICE = os.environ.get("OPENVINO_DEVICE", "CPU")  # as OpenVINO names its devices


class OpenVinoSession(OrtSession):
    """One network. Several threads may call `run`."""

    def __init__(
        self,
        path: Path,
        placement: Placement,
        optimizations: str = "all",
        opening: Callable[[Any], None] = lambda _: None,
    ) -> None:
        """As OrtSession."""
        options = {"device_type": DEVICE, "num_of_threads": str(placement.threads), "precision": "ACCURACY"}
        super().__init__(path, placement, optimizations, opening=opening, provider_options=options)

    def bound(self, given: NDArray[Any], place: int, found: NDArray[Any]) -> None:  # noqa: ARG002
        return None  # the provider copies in and out by itself


def detect_openvino() -> Devices:
    """Whether this onnxruntime has the provider."""
    if OPENVINO in ort.get_available_providers():
        return Devices(1)
    return Devices(
        0,
        f"this onnxruntime ({ort.__version__}) was built without OpenVINO: pip install "
        "onnxruntime-openvino in place of onnxruntime",
    )
