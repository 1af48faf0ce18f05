"""From a host to listeners: names with several addresses, and machines that do not have them all."""

from __future__ import annotations

import errno
import socket
from typing import Any

import pytest

from forwardpass.transport import addresses

Names = dict[str, list[str]]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """Addresses by name, as a resolver would have them."""
    known: Names = {}
    real = socket.getaddrinfo

    def look_up(host: str, *rest: Any, **more: Any) -> Any:
        return [info for address in known.get(host, [host]) for info in real(address, *rest, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known


def test_a_name_of_several_addresses_has_one_port_at_all(names: Names) -> None:
    names["both"] = ["127.0.0.1", "127.0.0.2", "127.0.0.1"]
    listeners = addresses.listen("both", 0)
    bound = [listener.getsockname() for listener in listeners]
    assert [address for address, _ in bound] == ["127.0.0.1", "127.0.0.2"]
    assert len({port for _, port in bound}) == 1
    with pytest.raises(OSError) as caught:
        addresses.listen("127.0.0.2", bound[0][1])
    assert caught.value.errno == errno.EADDRINUSE
    for listener in listeners:
        addresses.close(listener)


def test_an_address_that_the_machine_does_not_have_is_left_out_beside_one_that_it_has(names: Names) -> None:
    names["both"] = ["192.0.2.1", "127.0.0.1"]
    assert addresses.bindable("both") == ["127.0.0.1"]
    names["none"] = ["192.0.2.1"]
    with pytest.raises(OSError) as caught:
        addresses.bindable("none")
    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_every_interface_is_that_of_ipv4_where_there_is_no_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.create_server

    def without(address: Any, *, family: int, **more: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(address, family=family, **more)

    monkeypatch.setattr(socket, "create_server", without)
    assert addresses.bindable("::") == ["0.0.0.0"]


@pytest.mark.parametrize(
    ("host", "word"),
    [
        ("127.0.0.1", "127.0.0.1:7"),
        ("::", "[::]:7"),
        ("[::1]", "[::1]:7"),
        ("unix:/a", "unix:/a"),
        ("unix:///a", "unix:/a"),
    ],
)
def test_an_endpoint_is_one_word(host: str, word: str) -> None:
    assert addresses.endpoint(host, 7) == word
