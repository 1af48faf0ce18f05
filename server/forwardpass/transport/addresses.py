"""Where a server listens: from `--host` and a port to sockets. Nothing is accepted here.

- An address is one listener; a name as many as addresses are found for it, all on one port.
- `::` takes IPv4 as well; where the machine has no IPv6 it is 0.0.0.0.
- `unix:/path` is a socket for processes of this machine, open to its owner and group. Its file goes with the server;
  one that a dead server left is replaced, one that is listened to is not.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import stat
from pathlib import Path
from typing import Final

UNIX: Final = "unix:"
UNIX_MODE: Final = 0o660
BACKLOG: Final = 1024
PORT_TRIES: Final = 20  # ports that are picked until one is free at every address
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # an address of a kind that this machine does not have


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
    """Host and port as one word, as gRPC has it; an IPv6 address in brackets."""
    if (path := unix_path(host)) is not None:
        return UNIX + path
    host = host.strip("[]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def beside(host: str) -> str:
    """Where ports of their own (metrics, health) listen: this machine alone, where calls come by a file."""
    return host if unix_path(host) is None else "localhost"


def found(host: str) -> list[str]:
    """The addresses of a host, in the order of preference. Raises OSError where there is none."""
    infos = socket.getaddrinfo(host.strip("[]") or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys(str(info[4][0]) for info in infos))


def listen(host: str, port: int) -> list[socket.socket]:
    """Listeners that do not block, all on one port; 0 picks one. Raises OSError where that cannot be."""
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
    """Of `found`, those that this machine has, for a library that binds by itself. Raises OSError without any."""
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
        Path(path).chmod(UNIX_MODE)  # before anybody can be accepted
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def clear_unix(path: str) -> None:
    """Remove the file that a dead server left. Raises OSError where a server listens, or it is no socket."""
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


def close(listener: socket.socket) -> None:
    """Close a listener, and remove its file where it has one."""
    path = listener.getsockname() if listener.family == socket.AF_UNIX else None
    listener.close()
    if path:
        with contextlib.suppress(OSError):
            Path(path).unlink()
