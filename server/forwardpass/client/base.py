"""The base of both clients: channel options that suit Kubernetes, credentials, and retries.

The operations are elsewhere. Opens channels; makes no call.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike
from typing import Any, Final

from forwardpass.client import notebook
from forwardpass.client.coalescer import CLOSED, Coalesce
from forwardpass.client.credentials import Tls, check_plaintext, token_source
from forwardpass.client.errors import CallError, Cancelled, from_status
from forwardpass.client.operations import Call, Operations
from forwardpass.client.retry import Retrying
from forwardpass.client.tracing import open_client_tracing
from forwardpass.protocol import INFERENCE_SERVICE

DEFAULT_ADDRESS: Final = "127.0.0.1:8001"
_MIB = 1 << 20
# Health checks should report at once whether the server is reachable.
_NOT_RETRIED = frozenset(f"/{INFERENCE_SERVICE}/{name}" for name in ("ServerLive", "ServerReady", "ModelReady"))


@dataclass(frozen=True, slots=True)
class Counts:
    """A client's counters since it was created."""

    retries: int  # attempts beyond the first, of all calls
    shared_rows: int  # rows sent in coalesced requests, which may hold one caller's rows or several callers'
    shared_requests: int  # coalesced requests


class BaseClient:
    """The arguments of Client and AsyncClient, and the channel made from them."""

    # How channels are made: (address, options=) and (address, credentials, options=).
    _open: Callable[..., Any]
    _open_secure: Callable[..., Any]
    _make_coalescer: Callable[[Coalesce], Any]  # makes the object that coalesces calls
    _event: Callable[[], Any]  # makes an event that is set when the client is closed

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: float | None = 30.0,
        max_message_bytes: int = 64 * _MIB,
        keepalive: float = 60.0,
        attempts: int = 4,
        retry_full: bool = False,
        health_check: bool = True,
        coalesce: Coalesce | None = None,
        tls: Tls | None = None,
        token: str | None = None,
        token_file: str | PathLike[str] | None = None,
        plaintext_token: bool = False,
        options: Iterable[tuple[str, Any]] = (),
    ) -> None:
        """Does not touch the network; the first call connects.

        - `address`: any gRPC target: "host:port", "unix:/path"; "dns:///service.namespace:8001" or
          "ipv4:10.0.0.1:8001,10.0.0.2:8001", whose addresses are called in turn.
        - `timeout`: default seconds for a call, all its attempts together; None or inf: no limit.
        - `max_message_bytes`: the largest message sent or received.
        - `keepalive`: seconds of silence in a call after which the server is pinged; 0: never.
        - `attempts`: most attempts of a call, 1 to 10, while its status is UNAVAILABLE. See `retry`.
        - `retry_full`: also retry a call rejected with RESOURCE_EXHAUSTED and a time to retry after.
        - `health_check`: skip servers that grpc.health.v1 reports as not serving; one without that service counts as
          serving. Without it, calls reach a server that is still loading or already draining.
        - `coalesce`: let concurrent calls of `predict` share requests. See `coalescer`.
        - `tls`: None for plaintext.
        - `token`, or `token_file`, which is read again when it changes: sent with every call as
          `authorization: Bearer TOKEN`.
        - `plaintext_token`: send a token without TLS to other machines too, as where a mesh encrypts what leaves the
          pod.
        - `options`: gRPC channel arguments, (name, value); they override those made from the above.

        Raises SettingsError for files that cannot be used, and for a token that could be read on the way.
        """
        if not 1 <= attempts <= 10:
            raise ValueError(f"attempts: expected 1 to 10, got {attempts}")
        self.address = address
        self._operations = Operations(timeout)
        self._retrying = Retrying(attempts, retry_full)
        self._coalescer = None if coalesce is None else self._make_coalescer(coalesce)
        self._credentials = None if tls is None else tls.credentials()
        self._token = token_source(token, token_file)
        self._tracing = open_client_tracing()
        if self._token is not None:
            check_plaintext(address, tls, plaintext_token)
        arguments: dict[str, Any] = {
            "grpc.max_send_message_length": max_message_bytes,
            "grpc.max_receive_message_length": max_message_bytes,
            # By default, gRPC waits a second before it first reconnects, and up to two minutes later.
            "grpc.initial_reconnect_backoff_ms": 100,
            "grpc.max_reconnect_backoff_ms": 5000,
            "grpc.service_config": json.dumps(_service_config(health_check)),
        }
        if keepalive:
            arguments["grpc.keepalive_time_ms"] = int(keepalive * 1000)
        if tls is not None and tls.server_name is not None:
            arguments["grpc.ssl_target_name_override"] = tls.server_name
        scheme, _, rest = address.partition(":")
        if scheme in ("ipv4", "ipv6"):
            # From a list of addresses gRPC would make an authority with commas, which strict servers reject.
            arguments["grpc.default_authority"] = rest.lstrip("/").partition(",")[0]
        self._arguments = tuple((arguments | dict(options)).items())
        self._channel: Any = None
        self._closed = False
        self._closing = self._event()
        self._methods: dict[str, Any] = {}  # by path: the channel's callable
        self._lock = threading.Lock()
        self._retries = 0

    def __repr__(self) -> str:
        facts = [self.address]
        facts += ["TLS"] if self._credentials is not None else []
        facts += ["with a token"] if self._token is not None else []
        facts += ["closed"] if self._closed else []
        return f"<{type(self).__name__} of {', '.join(facts)}>"

    def _repr_html_(self) -> str:
        counts = self.counts
        seconds = self._operations.limit(None)
        state = "closed" if self._closed else "open" if self._channel is not None else "connects with the first call"
        rows = [
            ("address", self.address),
            ("encryption", "none" if self._credentials is None else "TLS"),
            ("token", "none" if self._token is None else "sent with every call"),
            ("time limit of a call", "none" if seconds is None else f"{seconds:g} s"),
            ("state", state),
            ("calls made again", counts.retries),
        ]
        if self._coalescer is not None:
            rows.append(("rows that shared requests", f"{counts.shared_rows} in {counts.shared_requests}"))
        return notebook.table(type(self).__name__, ("", ""), rows)

    @property
    def counts(self) -> Counts:
        """This client's counters so far."""
        coalescer = self._coalescer
        return Counts(self._retries, *((0, 0) if coalescer is None else coalescer.counts))

    def _method(self, path: str) -> Any:
        """The callable for the unary method at `path`. Raises ValueError once the client is closed."""
        with self._lock:
            return self._methods.setdefault(path, self._opened().unary_unary(path))

    def _stream(self, path: str) -> Any:
        """As `_method`, for a bidirectional streaming method."""
        with self._lock:
            return self._opened().stream_stream(path)

    def _opened(self) -> Any:
        """The channel, created on first use: an asyncio channel binds to the loop running then."""
        if self._closed:
            raise ValueError(CLOSED)
        if self._channel is None:
            if self._credentials is None:
                self._channel = self._open(self.address, options=self._arguments)
            else:
                self._channel = self._open_secure(self.address, self._credentials, options=self._arguments)
        return self._channel

    def _end(self) -> Any:
        """Mark the client closed: later calls raise ValueError. Returns the channel to close, if there is one."""
        with self._lock:
            self._closed = True
            self._methods.clear()
            return self._channel

    def _raise_closed(self) -> None:
        """Raise Cancelled if the client was closed, which may happen during a call."""
        if self._closed:
            raise Cancelled("the client was closed") from None

    def _metadata(self, asked: tuple[tuple[str, str], ...] = ()) -> tuple[tuple[str, str], ...]:
        """A call's own metadata `asked`, with the token. If the token file cannot be read, the last token is kept."""
        return asked if self._token is None else (*asked, ("authorization", self._token()))

    def _failure(self, error: Any, timeout: float | None) -> CallError:
        """A grpc.RpcError of either kind of channel as a CallError."""
        return from_status(
            error.code().value[0],
            error.details() or "",
            error.trailing_metadata() or (),
            address=self.address,
            timeout=timeout,
        )

    def _pause(self, error: CallError, call: Call, attempt: int, began: float) -> float:
        """Seconds until a failed call is retried. Raises the error if it is not.

        `attempt`: attempts made so far; `began`: the time of the first.
        """
        if call.path in _NOT_RETRIED:
            raise error
        left = None if call.timeout is None else call.timeout - (time.monotonic() - began)
        pause = self._retrying.pause(error, attempt, left)
        if pause is None:
            raise error
        with self._lock:
            self._retries += 1
        return pause


def left_of(call: Call, began: float) -> float | None:
    """Seconds left until a call's deadline; None: it has none."""
    return None if call.timeout is None else max(0.0, call.timeout - (time.monotonic() - began))


def _service_config(health_check: bool) -> dict[str, Any]:
    # No retryPolicy: gRPC's own supports neither google.rpc.RetryInfo nor `retry_full`.
    config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if health_check:
        config["healthCheckConfig"] = {"serviceName": ""}
    return config
