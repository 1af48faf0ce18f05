"""Batch sizes on a command line: `1,64,1024`."""

from __future__ import annotations

import argparse


def parse(text: str) -> tuple[int, ...]:
    """The sizes, ascending and unique. Raises ArgumentTypeError, for argparse, with the expected form."""
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of rows from 1, as in 1,64,1024; got {text!r}")
    return tuple(sizes)
