"""What clients of the direct transport may use: the limits of one connection, and those over all. Values only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits on what the client of one connection may use; the names are those of the settings."""

    max_streams: int
    max_metadata_bytes: int
    max_message_bytes: int
    max_unread_seconds: float = 2.0


@dataclass(frozen=True, slots=True)
class Http2Limits(ConnectionLimits):
    """The same, with those that hold over all connections or are kept by the sockets."""

    max_bytes: int = 512 << 20
    max_connection_age: float = 0.0
