"""libnghttp2 as a gRPC server configures it: its limits, and the settings that a connection begins with."""

from __future__ import annotations

import functools
from typing import Final

from ngh2 import Configuration, Role
from ngh2 import Connection as Engine

from forwardpass.transport.http2.backlog import MAX_CONCURRENT_STREAMS
from forwardpass.transport.http2.limits import ConnectionLimits
from forwardpass.transport.http2.send_side import STREAM_WINDOW

WINDOW: Final = 1 << 30  # bytes per connection; the calls' own windows and the receive budget are the real bounds
LARGEST_FRAME: Final = 1 << 16  # bytes, that a client may send: a large message takes fewer frames
CONTINUATIONS: Final = 64  # CONTINUATION frames that one call's headers may take
# Resets that a client may send: a burst, and a number per second. Each deadline that passes is one, so overload brings
# thousands; a reset costs no more here than a call.
RESETS: Final = (100_000, 20_000)
# What else libnghttp2 takes for an attack, likewise: it counts the calls that it is made to reject in overload.
GLITCHES: Final = (200_000, 100_000)
INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = 4, 5, 6  # setting numbers


@functools.lru_cache(8)
def _configuration(max_metadata_bytes: int) -> Configuration:
    return Configuration(
        auto_window_update=False,
        stream_reset_rate_limit=RESETS,
        glitch_rate_limit=GLITCHES,
        max_continuations=CONTINUATIONS,
        # A call whose metadata exceeds the limit is rejected; one far beyond it ends the connection.
        max_inbound_header_list_size=max(1 << 16, 4 * max_metadata_bytes),
    )


def ended() -> Engine:
    """An engine without a connection: it has no streams, and nothing to send."""
    return Engine(Role.SERVER)


def begin(limits: ConnectionLimits) -> Engine:
    """The engine of a new connection, its settings queued."""
    engine = Engine(Role.SERVER, _configuration(limits.max_metadata_bytes))
    engine.initiate_connection(
        {
            MAX_CONCURRENT_STREAMS: limits.max_streams,
            INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            MAX_FRAME_SIZE: LARGEST_FRAME,
            MAX_HEADER_LIST_SIZE: limits.max_metadata_bytes,
        }
    )
    engine.set_local_window_size(WINDOW)
    return engine
