"""Export a PyTorch network to ONNX with a numerical contract: `from forwardpass.export import export`.

Needs the `train` extra (torch, onnx, onnxscript) and ONNX Runtime; `estimator`, for fitted estimators, needs the extra
`estimators` instead. Serving never imports this package.
The stages, in order: input_spec -> torch_network -> translate -> staged_version -> parity -> the contract; `exporter`
connects them.
"""

import os
from typing import TYPE_CHECKING, Any

__all__ = ["ExportedModel", "InputSpec", "export"]

if TYPE_CHECKING:
    from forwardpass.export.contract_parts import ExportedModel
    from forwardpass.export.exporter import export
    from forwardpass.export.input_spec import InputSpec


# ONNX Runtime's Linux wheels send usage telemetry unless disabled.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `forwardpass export --help` does not wait for torch.
    if name == "export":
        from forwardpass.export.exporter import export

        return export
    if name == "ExportedModel":
        from forwardpass.export.contract_parts import ExportedModel

        return ExportedModel
    if name == "InputSpec":
        from forwardpass.export.input_spec import InputSpec

        return InputSpec
    raise AttributeError(f"module 'forwardpass.export' has no attribute {name!r}")
