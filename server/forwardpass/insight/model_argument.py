"""Resolve MODEL on the command line: a model's name in a repository, a version's folder, or an .onnx file.

Reads folders and the contract; opens no network.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from forwardpass.errors import InsightError
from forwardpass.model.contract import CONTRACT_FILE, MODEL_FILE, Contract, Tolerance

# The tolerance for a model without a contract: the exporter's own bound for 32-bit floats.
TOLERANCE = Tolerance(rtol=1e-4, atol=1e-5)


@dataclass(frozen=True, slots=True)
class Source:
    """One network's file, with its name, version and contract."""

    name: str
    version: str  # "" for a bare file
    path: Path
    contract: Contract | None

    @property
    def title(self) -> str:
        return f"{self.name} version {self.version}" if self.version else self.name

    @property
    def tolerance(self) -> Tolerance:
        return self.contract.tolerance if self.contract is not None else TOLERANCE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and --repository, the same for every command that inspects a model."""
    parser.add_argument(
        "model", metavar="MODEL", help="a model's name in the repository, the folder of a model or version, or a file"
    )
    parser.add_argument(
        "--repository", type=Path, default=Path("models"), metavar="DIR", help="the repository [%(default)s]"
    )


def find(model: str, repository: Path) -> Source:
    """The newest version of a model by name, or the network at a path. Raises InsightError, ContractError."""
    inside = "/" not in model and model not in ("", ".", "..")
    for folder in ([repository / model] if inside else []) + [Path(model)]:
        if folder.is_file():
            return Source(folder.stem, "", folder, None)
        if (folder / MODEL_FILE).is_file():
            return _version(folder.resolve())
        if folder.is_dir():
            numbers = [e.name for e in folder.iterdir() if e.name.isdecimal() and (e / MODEL_FILE).is_file()]
            if numbers:
                return _version(folder.resolve() / max(numbers, key=int))
    known = sorted(p.parent.parent.name for p in repository.glob(f"*/[0-9]*/{MODEL_FILE}"))
    there = f"; {repository} has {', '.join(dict.fromkeys(known))}" if known else f"; {repository} has no models"
    raise InsightError(f"there is no model {model!r}: neither a file, nor a folder with VERSION/{MODEL_FILE}{there}")


def _version(folder: Path) -> Source:
    contract = folder / CONTRACT_FILE
    return Source(
        folder.parent.name,
        folder.name,
        folder / MODEL_FILE,
        Contract.load(contract) if contract.is_file() else None,
    )
