"""Connections, calls and statuses: bytes of a network come in, bytes go out. Knows no model."""
