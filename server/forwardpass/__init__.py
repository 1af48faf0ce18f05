"""Forwardpass: serve small neural networks over gRPC.

The package's root imports nothing heavy: `torch` is never needed to serve, and `onnxruntime` only by a server.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]

if TYPE_CHECKING:
    from forwardpass.client import AsyncClient, Client


def __getattr__(name: str) -> Any:
    # Loaded on first use: an exporter does not pay for gRPC.
    if name in ("AsyncClient", "Client"):
        from forwardpass import client

        return getattr(client, name)
    raise AttributeError(f"module 'forwardpass' has no attribute {name!r}")
