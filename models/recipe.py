"""What a recipe is: a folder with data.py, network.py, train.py and model.toml that makes versions of one model.

The same sources give the same network on the same machine. Where the newest version was made from these very sources
nothing is done, and then neither PyTorch nor the data is loaded.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forwardpass.errors import ContractError, ForwardpassError
from forwardpass.export.staged_version import versions
from forwardpass.model.contract import CONTRACT_FILE, Contract

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    Rows = NDArray[np.float32] | dict[str, NDArray[Any]]

_SHARED = (Path(__file__), Path(__file__).with_name("training.py"))


@dataclass(frozen=True)
class Recipe:
    """One network, its data and how it learns.

    Rows are x [N, features] float32, or arrays by input of which one is that, and y [N] int64.
    """

    folder: Path  # models/<name>
    network: Callable[[], nn.Module]  # has the buffers `mean` and `scale`, [features]
    training: Callable[[], tuple[Rows, NDArray[np.int64]]]
    held_out: Callable[[], tuple[Rows, NDArray[np.int64]]]
    labels: Sequence[str]
    one_scale: bool  # features are alike (pixels): standardise them by one deviation, not each by its own
    epochs: int
    batch_rows: int
    learning_rate: float  # at the start; falls to zero along half a cosine
    accuracy: float  # held-out rows that must be right, 0 to 1; below it nothing is exported
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by input: the names of its features
    categories: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by input: what its values stand for

    @property
    def name(self) -> str:
        return self.folder.name

    def digest(self) -> str:
        """One sha256 over every source that the weights come from."""
        digest = hashlib.sha256()
        for path in (*(self.folder / file for file in ("data.py", "network.py", "train.py")), *_SHARED):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def run(recipe: Recipe, argv: Sequence[str] | None = None) -> int:
    """Train and export, or say that there is nothing to do. The exit status."""
    parser = argparse.ArgumentParser(description=f"Train the model {recipe.name!r} and export it.")
    parser.add_argument(
        "--repository",
        type=Path,
        default=recipe.folder.parent,
        metavar="DIR",
        help="export to DIR (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="train again, and export one more version")
    args = parser.parse_args(argv)
    folder = args.repository / recipe.name
    present = None if args.force else up_to_date(folder, recipe.digest())
    if present is not None:
        print(f"{recipe.name}: {present} is up to date")
        return 0
    print(f"{recipe.name}: loading PyTorch and the data", flush=True)
    try:
        from training import train_and_export  # brings PyTorch in

        return train_and_export(recipe, args.repository)
    except ForwardpassError as error:
        print(f"{recipe.name}: {error}", file=sys.stderr)
        return 1


def up_to_date(folder: Path, digest: str) -> Path | None:
    """The newest version in a model's folder, if it is whole and was made from the sources of this digest."""
    newest = max(versions(folder), default=None)
    if newest is None:
        return None
    place = folder / str(newest)
    try:
        contract = Contract.load(place / CONTRACT_FILE)
        contract.verify_files(place)
    except ContractError:
        return None
    return place if contract.source == digest else None
