"""Parsers of command-line arguments, for argparse's `type`: each returns the value or raises ArgumentTypeError."""

from __future__ import annotations

import argparse
import re


def count(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return number


def seconds(text: str) -> float:
    """A number of seconds above 0."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"expected more than 0 seconds, got {text}")
    return number


def duration(text: str) -> float:
    """A time with its unit, such as 50ms, in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)", text)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"expected a time like 50ms, got {text}")
    return float(found[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[found[2]]


def rate(text: str) -> float:
    """Requests a second: above 0 and at most 1e7."""
    number = float(text)
    if not 0 < number <= 1e7:
        raise argparse.ArgumentTypeError(f"expected more than 0 and at most 1e7 requests/s, got {text}")
    return number
