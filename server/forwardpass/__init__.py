"""Forwardpass: serve small neural networks over gRPC.

The package's root imports nothing heavy: `torch` is never needed to serve, and `onnxruntime` only by a server.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__", "export"]

if TYPE_CHECKING:
    from forwardpass.client import AsyncClient, Client
    from forwardpass.export import export


def __getattr__(name: str) -> Any:
    # Loaded on first use: a client does not pay for the exporter, nor an exporter for gRPC.
    if name in ("AsyncClient", "Client"):
        from forwardpass import client

        return getattr(client, name)
    if name == "export":
        from forwardpass.export import export

        return export
    raise AttributeError(f"module 'forwardpass' has no attribute {name!r}")
