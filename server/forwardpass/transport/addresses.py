"""Listening addresses: from `--host` and a port to bound sockets. Nothing is accepted here.

- An address gives one listener; a name gives one for each address found for it, all on one port.
- `::` also takes IPv4; on a machine without IPv6 it means 0.0.0.0.
- `unix:/path` is a socket for processes of this machine, open to its owner and group. Its file is removed with the
  server; a file left by a dead server is replaced, one that a server still listens on is not.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import stat
from pathlib import Path
from typing import Final

from forwardpass.transport.handed_listener import Listener

UNIX: Final = "unix:"
UNIX_MODE: Final = 0o660
BACKLOG: Final = 1024
PORT_TRIES: Final = 20  # attempts to pick a port that is free at every address
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # this machine has no address of this kind


def unix_path(host: str) -> str | None:
    """The path of a `unix:` host; None for others."""
    return host.removeprefix(UNIX).removeprefix("//") if host.startswith(UNIX) else None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on `host`."""
    try:
        return host == "localhost" or unix_path(host) is not None or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def endpoint(host: str, port: int) -> str:
    """Host and port as one string in gRPC's form; an IPv6 address in brackets."""
    if (path := unix_path(host)) is not None:
        return UNIX + path
    host = host.strip("[]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def beside(host: str) -> str:
    """The host for the separate ports (metrics, health): `host` itself, or localhost for a `unix:` host."""
    return host if unix_path(host) is None else "localhost"


def found(host: str) -> list[str]:
    """The addresses of a host, in order of preference. Raises OSError if there are none."""
    infos = socket.getaddrinfo(host.strip("[]") or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys(str(info[4][0]) for info in infos))


def listen(host: str, port: int) -> list[socket.socket]:
    """Return non-blocking listeners, all on one port; 0 picks one. Raises OSError if binding fails."""
    if (path := unix_path(host)) is not None:
        return [_listen_unix(path)]
    addresses = found(host)
    for left in reversed(range(PORT_TRIES)):
        try:
            return _listen_all(addresses, port)
        except OSError as error:
            if port or error.errno != errno.EADDRINUSE or not left:
                raise
    raise AssertionError("the last try raises")


def bindable(host: str) -> list[str]:
    """The addresses of `found` that this machine has, for a library that binds itself. Raises OSError if none."""
    if unix_path(host) is not None:
        return [host]
    with contextlib.ExitStack() as stack:
        listeners = listen(host, 0)
        for listener in listeners:
            stack.enter_context(listener)
        return [str(listener.getsockname()[0]) for listener in listeners]


def _listen_all(addresses: list[str], port: int) -> list[socket.socket]:
    listeners: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        absent: OSError | None = None
        for address in addresses:
            try:
                listener = _listen_tcp(address, port)
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                absent = error
                continue
            stack.callback(listener.close)
            listeners.append(listener)
            port = port or listener.getsockname()[1]
        if absent is not None and not listeners:
            raise absent
        stack.pop_all()
    return listeners


def _listen_tcp(address: str, port: int) -> socket.socket:
    six, any_six = ":" in address, address == "::"
    try:
        listener = socket.create_server(
            (address, port),
            family=socket.AF_INET6 if six else socket.AF_INET,
            backlog=BACKLOG,
            dualstack_ipv6=any_six and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        if any_six and error.errno in _ABSENT:
            return _listen_tcp("0.0.0.0", port)
        raise
    listener.setblocking(False)
    return listener


def _listen_unix(path: str) -> socket.socket:
    clear_unix(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        Path(path).chmod(UNIX_MODE)  # before anyone can connect
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def clear_unix(path: str) -> None:
    """Remove the file left by a dead server. Raises OSError if a server listens on it or it is not a socket."""
    try:
        if not stat.S_ISSOCK(Path(path).stat().st_mode):
            raise OSError(errno.EADDRINUSE, f"{path} is there and is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        try:
            asking.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
        else:
            raise OSError(errno.EADDRINUSE, f"a server listens on {path}")


def close(listener: Listener) -> None:
    """Close a listener, and remove its file if it has one."""
    path = str(listener.getsockname()) if listener.family == socket.AF_UNIX else ""
    listener.close()
    if path:
        with contextlib.suppress(OSError):
            Path(path).unlink()
