"""Server-wide limits over all models: requests and bytes in flight, and whether new requests are admitted at all.

Each model is bounded by its own queue, so that a slow model fills its queue and not the server. The bounds here are
the last line of defence and protect memory. Transports admit requests in groups, so the lock is taken once per group.
"""

from __future__ import annotations

import threading

from forwardpass.errors import Draining, Overloaded, Reason, RequestError

RETRY_AFTER = 0.1  # seconds, sent with rejections for the server's bounds


class Admission:
    """Counts requests and bytes in flight. Thread-safe; only `wait_empty` blocks.

    - Every admitted request is released exactly once, by the code that settles it.
    - in flight <= max_requests, and bytes <= max_bytes except for a single request alone.
    """

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self.max_requests = max_requests
        self.max_bytes = max_bytes
        self.requests = 0
        self.nbytes = 0
        self._closed = False
        self._lock = threading.Lock()
        self._empty = threading.Condition(self._lock)

    def admit(self, requests: int, nbytes: int) -> RequestError | None:
        """Admit `requests` requests of `nbytes` bytes in total, or none: then the returned error applies to each."""
        with self._lock:
            if self._closed:
                return Draining("the server is stopping; send this to another one")
            if self.requests + requests > self.max_requests:
                return Overloaded(
                    f"the server has {self.requests} requests in flight, the bound is {self.max_requests}",
                    reason=Reason.SERVER_REQUESTS,
                    retry_after=RETRY_AFTER,
                )
            if (self.requests or requests > 1) and self.nbytes + nbytes > self.max_bytes:
                return Overloaded(
                    f"the server has {self.nbytes} bytes of requests in flight, the bound is {self.max_bytes}",
                    reason=Reason.SERVER_BYTES,
                    retry_after=RETRY_AFTER,
                )
            self.requests += requests
            self.nbytes += nbytes
            return None

    def release(self, requests: int, nbytes: int) -> None:
        """Record that `requests` admitted requests were settled."""
        with self._lock:
            self.requests -= requests
            self.nbytes -= nbytes
            if not self.requests:
                self._empty.notify_all()

    def close(self) -> None:
        """Reject everything from now on."""
        with self._lock:
            self._closed = True

    def wait_empty(self, seconds: float) -> bool:
        """Block until nothing is in flight, for at most `seconds`. Returns whether that was reached."""
        with self._lock:
            return self._empty.wait_for(lambda: not self.requests, timeout=seconds)
