"""Reverse proxies between a client and the server: nginx, HAProxy and nghttpx, as Debian has them.

Clients reach them over plaintext HTTP/2; they reach the server over plaintext or TLS. Nothing is installed from here.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.conformance.drains import free_ports

SECONDS = 20.0  # for a proxy to start, and to end


def _nginx(port: int, server: str, tls: bool, folder: Path) -> list[str]:
    temporary = "\n".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    scheme = "grpcs" if tls else "grpc"
    (folder / "nginx.conf").write_text(
        f"""daemon off; pid {folder}/pid; worker_processes 1;
events {{ worker_connections 512; }}
http {{
    access_log off; client_max_body_size 0; {temporary}
    upstream servers {{ server {server}; keepalive 16; }}
    server {{ listen 127.0.0.1:{port} http2; location / {{ grpc_pass {scheme}://servers; }} }}
}}
"""
    )
    return ["nginx", "-c", str(folder / "nginx.conf"), "-e", str(folder / "errors")]


def _haproxy(port: int, server: str, tls: bool, folder: Path) -> list[str]:
    speaks = "ssl verify none alpn h2" if tls else "proto h2"
    (folder / "haproxy.cfg").write_text(
        f"""defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen grpc
    bind 127.0.0.1:{port} proto h2
    server one {server} {speaks}
"""
    )
    return ["haproxy", "-db", "-f", str(folder / "haproxy.cfg")]


def _nghttpx(port: int, server: str, tls: bool, folder: Path) -> list[str]:
    backend = f"--backend={server.replace(':', ',')};;proto=h2{';tls' if tls else ''}"
    logs = ["--accesslog-file=/dev/null", f"--errorlog-file={folder}/errors"]
    return ["nghttpx", "--conf=/dev/null", f"--frontend=127.0.0.1,{port};no-tls", backend, "--insecure", *logs]


PROXIES: dict[str, tuple[str, Callable[[int, str, bool, Path], list[str]]]] = {
    "nginx": ("nginx-light", _nginx), "haproxy": ("haproxy", _haproxy), "nghttpx": ("nghttp2-proxy", _nghttpx),
}  # fmt: skip


@contextlib.contextmanager
def in_front(proxy: str, server: str, tls: bool, folder: Path) -> Iterator[str]:
    """The address of a proxy in front of the server of this address. Skips the test where there is no such proxy."""
    package, configure = PROXIES[proxy]
    if shutil.which(proxy) is None:
        pytest.skip(f"{proxy} is not there (Debian: {package})")
    (port,) = free_ports(1)
    with (folder / "output").open("w") as output:
        running = subprocess.Popen(configure(port, server, tls, folder), stdout=output, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + SECONDS
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            assert running.poll() is None and time.monotonic() < until, (folder / "output").read_text()
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        running.terminate()
        running.wait(SECONDS)
