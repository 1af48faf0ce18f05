"""A real Envoy in front of servers on loopback, balancing calls as a mesh's sidecar or a gateway would.

It asks each server's gRPC health, tries a call again elsewhere, and ejects a server whose answers fail or are late.
"""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.deploy import toolbox

CLUSTER = "forwardpass"
TYPE = "type.googleapis.com/envoy.extensions"
# Refused, gone, reset, or too late: each may be tried elsewhere, an inference has no side effects.
RETRY_ON = "unavailable,deadline-exceeded,connect-failure,refused-stream,reset,retriable-status-codes"


def configuration(
    port: int, admin: int, servers: Sequence[str], try_seconds: float, ejected_seconds: float
) -> dict[str, Any]:
    """Envoy's bootstrap. What docs/kubernetes.md says of balancing through a proxy is this."""
    route = {
        "cluster": CLUSTER,
        "timeout": "30s",
        "retry_policy": {
            "retry_on": RETRY_ON,
            "retriable_status_codes": [503, 504],
            "num_retries": 4,
            "per_try_timeout": f"{try_seconds}s",
            "retry_host_predicate": [
                {
                    "name": "envoy.retry_host_predicates.previous_hosts",
                    "typed_config": {"@type": f"{TYPE}.retry.host.previous_hosts.v3.PreviousHostsPredicate"},
                }
            ],
            "host_selection_retry_max_attempts": 5,
        },
    }
    hosts = [{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": route}]}]
    manager = {
        "@type": f"{TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "codec_type": "AUTO",
        "route_config": {"virtual_hosts": hosts},
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{TYPE}.filters.http.router.v3.Router"},
            }
        ],
    }
    upstream = {
        "@type": f"{TYPE}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    cluster = {
        "name": CLUSTER,
        "type": "STATIC",
        "connect_timeout": "1s",
        "lb_policy": "ROUND_ROBIN",
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": upstream},
        "load_assignment": {
            "cluster_name": CLUSTER,
            "endpoints": [
                {"lb_endpoints": [{"endpoint": {"address": _address(*server.split(":"))}} for server in servers]}
            ],
        },
        "health_checks": [
            {
                "timeout": "1s",
                "interval": "0.2s",
                "no_traffic_interval": "0.2s",
                "unhealthy_threshold": 1,
                "healthy_threshold": 1,
                "grpc_health_check": {},
            }
        ],
        "outlier_detection": {
            "consecutive_5xx": 3,
            "consecutive_gateway_failure": 3,
            "enforcing_consecutive_gateway_failure": 100,
            "interval": "0.5s",
            "base_ejection_time": f"{ejected_seconds}s",
            "max_ejection_percent": 50,
            # A slow server's health is fine, it is its answers that are late: time brings it back, health does not.
            "successful_active_health_check_uneject_host": False,
        },
        # By default three retries at a time: fewer than the calls that one server's death takes with it.
        "circuit_breakers": {"thresholds": [{"max_retries": 1000, "max_requests": 16384}]},
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
    }
    return {
        "admin": {"address": _address("127.0.0.1", admin)},
        "static_resources": {
            "listeners": [
                {
                    "address": _address("127.0.0.1", port),
                    "filter_chains": [
                        {"filters": [{"name": "envoy.http_connection_manager", "typed_config": manager}]}
                    ],
                }
            ],
            "clusters": [cluster],
        },
    }


def _address(host: str, port: int | str) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": int(port)}}


class Envoy:
    """A running Envoy; `address` is where it listens. Made on two free ports; leaving the context ends it."""

    def __init__(
        self,
        folder: Path,
        ports: Sequence[int],
        servers: Sequence[str],
        try_seconds: float = 10.0,
        ejected_seconds: float = 5.0,
    ) -> None:
        (binary,) = toolbox.need("envoy")
        self.address = f"127.0.0.1:{ports[0]}"
        self._admin = f"http://127.0.0.1:{ports[1]}"
        config = folder / "envoy.json"
        config.write_text(json.dumps(configuration(ports[0], ports[1], servers, try_seconds, ejected_seconds)))
        self._log = folder / "envoy.log"
        options = ["--disable-hot-restart", "--concurrency", "1", "--log-level", "warning"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen([binary, "-c", config, *options], stdout=log, stderr=log)

    def stats(self) -> dict[str, int]:
        """Its counters and gauges of the servers behind it. Raises OSError while it does not answer."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self._admin}/stats?format=json&filter=cluster.{CLUSTER}", timeout=5) as response:
            found = json.load(response)["stats"]
        return {s["name"].removeprefix(f"cluster.{CLUSTER}."): s["value"] for s in found if "value" in s}

    def wait_for(self, servers: int, seconds: float = 30.0) -> None:
        """Until that many servers are healthy."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                if self.stats().get("membership_healthy") == servers:
                    return
            except OSError:
                assert self._process.poll() is None, self._log.read_text()
            time.sleep(0.05)
        raise AssertionError(f"not {servers} healthy servers within {seconds:g} s:\n{self._log.read_text()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(20)
