"""Networks on Intel's OpenVINO, by ONNX Runtime's provider of that name: pip install onnxruntime-openvino.

That package replaces onnxruntime (each overwrites the other's files). OpenVINO computes on its own threads, and on the
CPU unless OPENVINO_DEVICE names another of its devices. For speed, its plugins may round to fewer bits than the network
has: the ACCURACY option asks for full precision, and replaying the contract at load detects violations.
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

DEVICE = os.environ.get("OPENVINO_DEVICE", "CPU")  # OpenVINO's name of the device


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
        return None  # the provider makes its own copies in and out


def detect_openvino() -> Devices:
    """One device if this onnxruntime has the provider, else none and the reason."""
    if OPENVINO in ort.get_available_providers():
        return Devices(1)
    return Devices(
        0,
        f"this onnxruntime ({ort.__version__}) was built without OpenVINO: pip install "
        "onnxruntime-openvino in place of onnxruntime",
    )
