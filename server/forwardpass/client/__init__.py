"""The client: numpy in, numpy out, over one gRPC channel. Needs neither torch nor onnxruntime.

    with Client("127.0.0.1:8001") as client:
        z = client.predict("digits", x)                      # one input, one output: [B, 64] or [64]
        answer = client.infer("ranker", {"user": u, "item": v}, timeout=0.05)
        answer["score"], answer.version

`Client` blocks and may be shared by threads; `AsyncClient` belongs to one event loop. Both share the code that builds
requests and reads responses, in `operations`, which uses no channel. docs/client.md explains which client to use when.

Imports `protocol`, `errors` and `watched_files`, and nothing of the server. Public are the names below; of the modules,
`arrays`, `control`, `errors`, `results` and `tables` are used by the commands too.
"""

from forwardpass.client.arrays import TensorInfo
from forwardpass.client.async_client import AsyncClient
from forwardpass.client.async_stream import AsyncStream
from forwardpass.client.base import DEFAULT_ADDRESS, Counts
from forwardpass.client.coalescer import Coalesce
from forwardpass.client.control import ModelStats
from forwardpass.client.credentials import PLAIN, Access, Tls
from forwardpass.client.errors import (
    AlreadyExists,
    CallError,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from forwardpass.client.ranking import Ranked
from forwardpass.client.results import Answer, ModelInfo, ModelState, ServerInfo
from forwardpass.client.sync_client import Client
from forwardpass.client.sync_stream import Stream
from forwardpass.protocol.timings import Timings

__all__ = [
    "DEFAULT_ADDRESS", "PLAIN", "Access", "AlreadyExists", "Answer", "AsyncClient", "AsyncStream", "CallError",
    "Cancelled", "Client", "Coalesce", "Counts", "DeadlineExceeded", "FailedPrecondition", "Internal",
    "InvalidArgument", "ModelInfo", "ModelState", "ModelStats", "NotFound", "PermissionDenied", "Ranked",
    "ResourceExhausted", "ServerInfo", "Stream", "TensorInfo", "Timings", "Tls", "Unauthenticated", "Unavailable",
    "Unimplemented",
]  # fmt: skip
