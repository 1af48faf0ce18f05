"""Networks the export tests share: each one does, on purpose, what one test is about."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    """x [B, features] -> [B, classes]; the constructor has arguments to give."""

    def __init__(self, features: int = 5, hidden: int = 10, classes: int = 3, activation: str = "relu") -> None:
        super().__init__()
        self.hidden = nn.Linear(features, hidden)
        self.activation = {"relu": nn.ReLU(), "softplus": nn.Softplus()}[activation]
        self.dropout = nn.Dropout(0.5)
        self.output = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.output(self.dropout(self.activation(self.hidden(x))))
        return answer


def trained() -> nn.Module:
    """A function that makes a network and its weights."""
    torch.manual_seed(7)
    return Mlp()


class TwoTowers(nn.Module):
    """Items by index and users by features to several answers of several dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(50, 4)
        self.users = nn.Linear(3, 4)

    def forward(self, user: Tensor, item: Tensor) -> dict[str, Tensor]:
        score = (self.users(user) * self.items(item)).sum(-1, keepdim=True)
        return {"score": score, "liked": score > 0, "echo": item}


class Attend(nn.Module):
    """x [B, L, 4] of any length -> [B, L, 4] and its mean [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(self.mix(x) @ x.transpose(1, 2), -1)
        return weights @ x, x.mean(1)


class Cancels(nn.Module):
    """(x + 1e8) - 1e8 is x in float64, and 0 or 8 in float32: no honest tolerance holds."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1e8) - 1e8


class Single(nn.Module):
    """Makes a float32 matrix as it goes, so it cannot run in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.ones(5, 2, dtype=torch.float32)


class MixesRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class MeanOfRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(0)


class Sums(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class NoOnnxForm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x.unsqueeze(-1) * x.unsqueeze(-2))


class FixesTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] == 3 else x + x


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class GivesANumber(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x, 3


class Diverges(nn.Module):
    """Gives NaN below 0 and -inf at 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x.log()


@dataclass
class Detection:
    """What a detector answers with; `embedding` is for training alone."""

    boxes: Tensor
    score: Tensor
    embedding: Tensor | None = None


class Detects(nn.Module):
    """x [B, 5] -> a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Detection:
        found = self.layer(x)
        return Detection(boxes=found[:, :4], score=found[:, 4:].sigmoid())


class ModelOutput(OrderedDict[str, Any]):
    """As the package transformers has it: a dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Scores(NamedTuple):
    logits: Tensor
    pooled: Tensor


class Nested(nn.Module):
    """A ModelOutput of a tensor, a named tuple, and a tuple with None in it."""

    def forward(self, x: Tensor) -> ModelOutput:
        return ModelOutput(last=x * 2, scores=Scores(x + 1, x.mean(1)), attentions=(None, x.tanh()))


class ByKeyword(nn.Module):
    """Keyword-only inputs, one of them with a default, and any others."""

    def forward(self, *, user: Tensor, item: Tensor, scale: float = 2.0) -> Tensor:
        return user * scale - item


class AnyKeyword(nn.Module):
    def forward(self, **features: Tensor) -> Tensor:
        return features["age"] * 2 - features["income"]


class GivesText(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x, "done"
