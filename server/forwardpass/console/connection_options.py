"""The connection options of commands that call a server: TLS and a token, spelled the same for all of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from forwardpass.client import DEFAULT_ADDRESS, Access, Client, Tls
from forwardpass.console import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, except `--server`, which each command adds itself."""
    options = parser.add_argument_group("connection")
    options.add_argument("--tls", action="store_true", help="call by TLS; implied by any of the options --tls-...")
    options.add_argument(
        "--tls-ca", type=Path, metavar="FILE", help="authorities of the server's certificate, PEM [those of gRPC]"
    )
    options.add_argument("--tls-certificate", type=Path, metavar="FILE", help="the client's own certificate, PEM")
    options.add_argument("--tls-key", type=Path, metavar="FILE", help="its key, PEM")
    options.add_argument("--tls-server-name", metavar="NAME", help="the name in the server's certificate [the host]")
    options.add_argument("--token-file", type=Path, metavar="FILE", help="a file with the token to bring")
    options.add_argument(
        "--plaintext-token", action="store_true", help="bring it to other machines without TLS too, as inside a mesh"
    )


def add_call_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, with `--server` and `--timeout`, of a command that makes a few calls."""
    parser.add_argument("--server", default=DEFAULT_ADDRESS, metavar="HOST:PORT", help="[%(default)s]")
    parser.add_argument("--timeout", type=arguments.seconds, default=30.0, metavar="SECONDS", help="[%(default)s]")
    add_arguments(parser)


def client_of(args: argparse.Namespace) -> Client:
    """A client for the options of `add_call_arguments`."""
    # No health check: a server that is still loading must be able to report which models it is loading.
    return Client(args.server, timeout=args.timeout, health_check=False, retry_full=True, **options_of(args))


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as keyword arguments of Client."""
    return access_of(args).options()


def access_of(args: argparse.Namespace) -> Access:
    """The arguments, for callers that make no Client."""
    tls = None
    files = (args.tls_ca, args.tls_certificate, args.tls_key, args.tls_server_name)
    if args.tls or any(said is not None for said in files):
        tls = Tls(*files)
    return Access(tls, args.token_file, args.plaintext_token)
