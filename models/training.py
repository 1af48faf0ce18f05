"""How the recipes learn: cross-entropy on standardised rows, AdamW, a fixed seed, one thread; then the export.

All of it is the same for all recipes; what differs is in `Recipe`.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from recipe import Recipe
from torch import nn

from forwardpass.export import export

if TYPE_CHECKING:
    from recipe import Rows

SEED = 0


def fit(recipe: Recipe, progress: Callable[[int, float], None]) -> nn.Module:
    """A trained network in evaluation mode. `progress(epoch, loss)` is called after each epoch, from 1."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # sums in one order: the same bits on every run
    arrays, classes = recipe.training()
    x, y = _tensors(arrays), torch.from_numpy(classes)
    network = recipe.network()
    (numbers,) = (values for values in x.values() if values.is_floating_point())
    deviation = numbers.std().expand(numbers.shape[1]) if recipe.one_scale else numbers.std(0)
    network.mean.copy_(numbers.mean(0))  # type: ignore[operator]
    network.scale.copy_(torch.where(deviation > 0, 1 / deviation, 1.0))  # type: ignore[operator]
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    for epoch in range(1, recipe.epochs + 1):
        network.train()
        total = 0.0
        for rows in torch.split(torch.randperm(len(y)), recipe.batch_rows):
            optimizer.zero_grad()
            loss = loss_of(network(**{name: values[rows] for name, values in x.items()}), y[rows])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        schedule.step()
        progress(epoch, total / len(y))
    return network.eval()


def accuracy(network: nn.Module, x: Rows, y: NDArray[np.int64]) -> float:
    """Which part of the rows the network gets right, 0 to 1."""
    with torch.no_grad():
        return float((network(**_tensors(x)).argmax(1).numpy() == y).mean())


def _by_input(x: Rows) -> dict[str, NDArray[Any]]:
    return x if isinstance(x, dict) else {"x": x}


def _tensors(x: Rows) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in _by_input(x).items()}


def train_and_export(recipe: Recipe, repository: Path) -> int:
    """Train, hold the accuracy, save the weights, export the next version; the exit status. Raises ExportError."""
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
    print(f"{recipe.name}: {right:.2%} of {len(y)} held-out rows right")
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
        {name: _spec(array) for name, array in _by_input(x).items()},
        recipe.name,
        repository,
        outputs=["logits"],
        labels={"logits": recipe.labels, **recipe.columns},
        categories=recipe.categories,
        samples=_by_input(x),
        source=recipe.digest(),
    )
    print(
        f"{recipe.name}: wrote {exported.path}: {exported.parameters} parameters, largest difference from float64 "
        f"{exported.contract.largest_difference:.2g} over {len(y)} rows"
    )
    return 0


def _spec(array: NDArray[Any]) -> str:
    return f"{array.dtype}[{','.join(['batch', *map(str, array.shape[1:])])}]"


def _save_weights(network: nn.Module, path: Path) -> None:
    """All or nothing, as a state dict that `torch.load(weights_only=True)` reads."""
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        torch.save(network.state_dict(), beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
