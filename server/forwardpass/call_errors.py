"""The client's errors under the name they had first. New code takes them from `forwardpass.client`."""

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
    from_status,
)

__all__ = [
    "AlreadyExists", "CallError", "Cancelled", "DeadlineExceeded", "FailedPrecondition", "Internal", "InvalidArgument",
    "NotFound", "PermissionDenied", "ResourceExhausted", "Unauthenticated", "Unavailable", "Unimplemented",
    "from_status",
]  # fmt: skip
