"""What the recipes here have in common: train on real data, hold the accuracy, save the weights, export a version.

A recipe is a folder with data.py, network.py, train.py and model.toml. The same sources give the same network on the
same machine; where the newest version was made from these very sources, nothing is done.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from forwardpass.contract import CONTRACT_FILE, Contract
from forwardpass.errors import ContractError, ForwardpassError
from forwardpass.export import export
from forwardpass.export.staging import versions

SEED = 0


@dataclass(frozen=True)
class Recipe:
    """One network, its data and how it learns. Rows are x [N, features] float32, y [N] int64."""

    folder: Path  # models/<name>
    network: Callable[[], nn.Module]  # has the buffers `mean` and `scale`, [features]
    training: Callable[[], tuple[NDArray[np.float32], NDArray[np.int64]]]
    held_out: Callable[[], tuple[NDArray[np.float32], NDArray[np.int64]]]
    labels: Sequence[str]
    one_scale: bool  # features are alike (pixels): standardise them by one deviation, not each by its own
    epochs: int
    batch_rows: int
    learning_rate: float  # at the start; falls to zero along half a cosine
    accuracy: float  # held-out rows that must be right, 0 to 1; below it nothing is exported

    @property
    def name(self) -> str:
        return self.folder.name

    def digest(self) -> str:
        """One sha256 over every source that the weights come from."""
        digest = hashlib.sha256()
        for path in (*(self.folder / file for file in ("data.py", "network.py", "train.py")), Path(__file__)):
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
    try:
        return _train_and_export(recipe, args.repository)
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


def fit(recipe: Recipe, progress: Callable[[int, float], None]) -> nn.Module:
    """A trained network in evaluation mode. `progress(epoch, loss)` is called after each epoch, from 1."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # sums in one order: the same bits on every run
    x, y = (torch.from_numpy(array) for array in recipe.training())
    network = recipe.network()
    deviation = x.std().expand(x.shape[1]) if recipe.one_scale else x.std(0)
    network.mean.copy_(x.mean(0))  # type: ignore[operator]
    network.scale.copy_(torch.where(deviation > 0, 1 / deviation, 1.0))  # type: ignore[operator]
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    for epoch in range(1, recipe.epochs + 1):
        network.train()
        total = 0.0
        for rows in torch.split(torch.randperm(len(x)), recipe.batch_rows):
            optimizer.zero_grad()
            loss = loss_of(network(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        schedule.step()
        progress(epoch, total / len(x))
    return network.eval()


def accuracy(network: nn.Module, x: NDArray[np.float32], y: NDArray[np.int64]) -> float:
    """Which part of the rows the network gets right, 0 to 1."""
    with torch.no_grad():
        return float((network(torch.from_numpy(x)).argmax(1).numpy() == y).mean())


def _train_and_export(recipe: Recipe, repository: Path) -> int:
    started = time.perf_counter()
    interactive = sys.stdout.isatty()

    def progress(epoch: int, loss: float) -> None:
        line = f"{recipe.name}: epoch {epoch}/{recipe.epochs}  loss {loss:.4f}  {time.perf_counter() - started:.1f} s"
        print(
            f"\r{line}" if interactive else line, end="" if interactive and epoch < recipe.epochs else "\n", flush=True
        )

    network = fit(recipe, progress)
    x, y = recipe.held_out()
    right = accuracy(network, x, y)
    print(f"{recipe.name}: {right:.2%} of {len(x)} held-out rows right")
    if right < recipe.accuracy:
        print(f"{recipe.name}: expected at least {recipe.accuracy:.0%}; nothing is exported", file=sys.stderr)
        return 1
    folder = repository / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    _save_weights(network, folder / "weights.pt")
    if not (folder / "model.toml").exists():
        shutil.copy(recipe.folder / "model.toml", folder)
    print(f"{recipe.name}: exporting", flush=True)
    exported = export(
        network,
        [f"x:float32[batch,{x.shape[1]}]"],
        recipe.name,
        repository,
        outputs=["logits"],
        labels=recipe.labels,
        samples={"x": x},
        source=recipe.digest(),
    )
    print(
        f"{recipe.name}: wrote {exported.path}: {exported.parameters} parameters, largest difference from float64 "
        f"{exported.contract.largest_difference:.2g} over {len(x)} rows"
    )
    return 0


def _save_weights(network: nn.Module, path: Path) -> None:
    """All or nothing, as a state dict that `torch.load(weights_only=True)` reads."""
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        torch.save(network.state_dict(), beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
