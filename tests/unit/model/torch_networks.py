"""Networks as people write them, by kind, each with what the graph is expected to prove of its rows.

`KINDS` has 120 and more. docs/repositories.md counts them in a table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from forwardpass.model.row_flow import RowFlow

INDEPENDENT, MIXES, UNKNOWN = RowFlow.INDEPENDENT, RowFlow.MIXES, RowFlow.UNKNOWN
BATCH = 4
Case = tuple[nn.Module, tuple[Any, ...]]  # a network and its inputs


class Of(nn.Module):
    """A function of tensors, as a network."""

    def __init__(self, function: Callable[..., Any], tensors: int = 1, *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.tensors, self.parts = function, tensors, nn.ModuleList(parts)

    def forward(self, x: Any, y: Any = None) -> Any:
        return self.function(*self.parts, *((x, y)[: self.tensors]))


def last(layer: Any, head: Any, x: Any) -> Any:
    return head(layer(x)[0][:, -1])


def reals(*shape: int) -> Any:
    return torch.randn(BATCH, *shape)


def whole(*shape: int, below: int = 8) -> Any:
    return torch.randint(0, below, (BATCH, *shape))


def cross(a: Any, b: Any, x: Any) -> Any:
    """A deep & cross layer and another."""
    return x * a(x) + x + x * b(x)


def widths(embeddings: Any, head: Any, ids: Any, x: Any) -> Any:
    return head(torch.cat([embeddings(ids).flatten(1), x], 1))


def deep_factorisation(embeddings: Any, head: Any, ids: Any) -> Any:
    found = embeddings(ids)
    return head(torch.cat([found.flatten(1), found.sum(1).pow(2) - found.pow(2).sum(1)], 1))


def moe(gate: Any, first: Any, second: Any, x: Any) -> Any:
    weights = gate(x).softmax(1)
    return weights[:, :1] * first(x) + weights[:, 1:] * second(x)


def trimmed(head: Any, x: Any, lengths: Any) -> Any:
    kept = torch.arange(x.shape[1])[None] < lengths.max()
    return head((x * kept[..., None]).sum(1) / kept.sum(1, keepdim=True).clamp(min=1))


def masked(head: Any, x: Any, lengths: Any) -> Any:
    kept = torch.arange(x.shape[1])[None] < lengths[:, None]
    return head((x * kept[..., None]).sum(1) / kept.sum(1, keepdim=True).clamp(min=1))


def picked(x: Any, places: Any) -> Any:
    return x[torch.arange(x.shape[0]), places]


linear = nn.Linear


def numbers() -> dict[str, Case]:
    return {
        "mlp": (nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 3), nn.Softmax(1)), (reals(8),)),
        "residual mlp": (Of(lambda a, b, x: x + b(functional.gelu(a(x))), 1, linear(8, 16), linear(16, 8)),
                         (reals(8),)),
        "batch norm": (nn.Sequential(linear(8, 8), nn.BatchNorm1d(8), nn.SiLU()), (reals(8),)),
        "layer norm": (nn.Sequential(nn.LayerNorm(8), nn.Mish(), linear(8, 2)), (reals(8),)),
        "rms norm": (nn.Sequential(nn.RMSNorm(8), linear(8, 2)), (reals(8),)),
        "dropout": (nn.Sequential(linear(8, 8), nn.Dropout(0.5), nn.ELU()), (reals(8),)),
        "glu": (nn.Sequential(linear(8, 8), nn.GLU(1)), (reals(8),)),
        "autoencoder": (nn.Sequential(linear(8, 2), nn.Tanh(), linear(2, 8), nn.Sigmoid()), (reals(8),)),
        "normalised": (Of(lambda x: functional.normalize(x, dim=1)), (reals(8),)),
        "standardised": (Of(lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)), (reals(8),)),
        "cross network": (Of(cross, 1, linear(8, 8), linear(8, 8)), (reals(8),)),
        "mixture of experts": (Of(moe, 1, linear(8, 2), linear(8, 4), linear(8, 4)), (reals(8),)),
        "factorisation machine": (Of(lambda v, x: v(x).pow(2).sum(1) - (v(x.pow(2))).sum(1), 1, linear(8, 4)),
                                  (reals(8),)),
        "chunks": (Of(lambda x: sum(part.tanh() for part in x.chunk(2, 1))), (reals(8),)),
        "largest two": (Of(lambda x: x.topk(2, 1)[0]), (reals(8),)),
        "perceptron": (linear(8, 1), (reals(8),)),
        "highway": (Of(lambda a, t, x: torch.sigmoid(t(x)) * a(x).relu() + (1 - torch.sigmoid(t(x))) * x, 1,
                       linear(8, 8), linear(8, 8)), (reals(8),)),
        "dense blocks": (Of(lambda a, b, x: b(torch.cat([x, a(x).relu()], 1)), 1, linear(8, 4), linear(12, 2)),
                         (reals(8),)),
        "self normalising": (nn.Sequential(linear(8, 8), nn.SELU(), nn.AlphaDropout(0.1), linear(8, 2)),
                             (reals(8),)),
        "swiglu": (Of(lambda a, b, c, x: c(functional.silu(a(x)) * b(x)), 1, linear(8, 12), linear(8, 12),
                      linear(12, 8)), (reals(8),)),
        "periodic": (Of(lambda a, x: torch.sin(30 * a(x)), 1, linear(8, 8)), (reals(8),)),
        "fourier features": (Of(lambda a, h, x: h(torch.cat([a(x).sin(), a(x).cos()], 1)), 1, linear(8, 6),
                                linear(12, 2)), (reals(8),)),
        "radial basis": (Of(lambda c, x: torch.exp(-(x[:, None] - c.weight[None]).pow(2).sum(2)), 1, linear(8, 5)),
                         (reals(8),)),
        "variational encoder": (Of(lambda a, b, x: torch.cat([a(x), functional.softplus(b(x))], 1), 1, linear(8, 3),
                                   linear(8, 3)), (reals(8),)),
        "prelu": (nn.Sequential(linear(8, 8), nn.PReLU(8), linear(8, 2)), (reals(8),)),
        "hard activations": (nn.Sequential(linear(8, 8), nn.Hardtanh(), nn.Hardsigmoid(), nn.Softsign()),
                             (reals(8),)),
        "soft tree": (Of(lambda a, h, x: h(torch.sigmoid(a(x)).unsqueeze(2).mul(1.0).flatten(1)), 1, linear(8, 7),
                         linear(7, 2)), (reals(8),)),
        "bilinear": (Of(lambda x, y, *_: x.unsqueeze(2).mul(y.unsqueeze(1)).flatten(1), 2), (reals(4), reals(3))),
        "maxout": (Of(lambda a, x: a(x).reshape(-1, 4, 3).amax(2), 1, linear(8, 12)), (reals(8),)),
        "quantiles": (Of(lambda a, x: a(x).cumsum(1), 1, linear(8, 5)), (reals(8),)),
        "temperature": (Of(lambda a, x: functional.log_softmax(a(x) / 1.7, 1), 1, linear(8, 5)), (reals(8),)),
        "clipped": (Of(lambda x: x.clamp(-1, 1).where(x > 0, x * 0.1)), (reals(8),)),
        "imputed": (Of(lambda a, x: a(torch.where(x.isnan(), torch.zeros_like(x), x)), 1, linear(8, 2)),
                    (reals(8),)),
        "binned": (Of(lambda x: (x[:, :, None] > torch.linspace(-1, 1, 5)).sum(2)), (reals(8),)),
        "ensemble": (Of(lambda a, b, c, x: torch.stack([a(x), b(x), c(x)]).mean(0), 1, linear(8, 2), linear(8, 2),
                        linear(8, 2)), (reals(8),)),
        "low rank": (nn.Sequential(linear(8, 2, bias=False), linear(2, 8), nn.GELU(approximate="tanh")),
                     (reals(8),)),
    }  # fmt: skip


def lookups() -> dict[str, Case]:
    return {
        "two towers": (Of(lambda a, b, x, y: (a(x) * b(y)).sum(1), 2, linear(8, 4), linear(6, 4)),
                       (reals(8), reals(6))),
        "wide and deep": (Of(widths, 2, nn.Embedding(8, 3), linear(11, 2)), (whole(2), reals(5))),
        "embedding": (Of(lambda e, h, i: h(e(i).mean(1)), 1, nn.Embedding(8, 4), linear(4, 2)), (whole(3),)),
        "one hot": (Of(lambda i: functional.one_hot(i, 8).float()), (whole(),)),
        "gathered": (Of(lambda x, i: x.gather(1, i), 2), (reals(8), whole(2))),
        "bag of words": (Of(lambda e, i: e(i).amax(1), 1, nn.Embedding(8, 4)), (whole(5),)),
        "matrix factorisation": (Of(lambda u, v, i, j: (u(i) * v(j)).sum(1), 2, nn.Embedding(8, 4), nn.Embedding(8, 4)),
                                 (whole(), whole())),
        "hashed": (Of(lambda e, i: e((i * 31 + 7) % 5).sum(1), 1, nn.Embedding(5, 4)), (whole(3),)),
        "deep factorisation": (Of(deep_factorisation, 1, nn.Embedding(8, 3), linear(9, 2)), (whole(2),)),
        "attention to items": (Of(lambda e, q, i, x: (e(i) * (e(i) @ q(x)[:, :, None]).softmax(1)).sum(1), 2,
                                  nn.Embedding(8, 4), linear(6, 4)), (whole(5), reals(6))),
        "all scores": (Of(lambda e, x: x @ e.weight.T, 1, nn.Embedding(9, 8)), (reals(8),)),
        "bigrams": (Of(lambda e, i: e(i[:, :-1] * 8 + i[:, 1:]).mean(1), 1, nn.Embedding(64, 4)), (whole(5),)),
        "masked ids": (Of(lambda e, i: (e(i) * (i != 0)[:, :, None]).sum(1), 1, nn.Embedding(8, 4)), (whole(5),)),
        "scattered": (Of(lambda x, i: torch.zeros_like(x).scatter(1, i, x[:, :2]), 2), (reals(8), whole(2))),
    }  # fmt: skip


def images() -> dict[str, Case]:
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return {
        "lenet": (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), linear(36, 3)),
                  (reals(1, 8, 8),)),
        "conv and pool": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.AdaptiveAvgPool2d(1),
                                        nn.Flatten(), linear(8, 2)), (reals(3, 9, 9),)),
        "depthwise": (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Hardswish(), nn.Conv2d(4, 2, 1)),
                      (reals(4, 6, 6),)),
        "squeeze and excite": (Of(lambda a, x: x * torch.sigmoid(a(x.mean((2, 3))))[:, :, None, None], 1, linear(4, 4)),
                               (reals(4, 5, 5),)),
        "group norm": (nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.SiLU()), (reals(4, 6, 6),)),
        "instance norm": (nn.InstanceNorm2d(4), (reals(4, 5, 5),)),
        "upsampled": (Of(lambda x: functional.interpolate(x, scale_factor=2)), (reals(3, 4, 4),)),
        "pixel shuffle": (Of(lambda x: functional.pixel_shuffle(x, 2)), (reals(8, 3, 3),)),
        "transposed conv": (nn.Sequential(nn.ConvTranspose2d(4, 2, 2, 2), nn.LeakyReLU()), (reals(4, 3, 3),)),
        "residual block": (Of(lambda a, b, x: (x + b(a(x).relu())).relu(), 1, nn.Conv2d(4, 4, 3, padding=1),
                              nn.Conv2d(4, 4, 3, padding=1)), (reals(4, 6, 6),)),
        "dilated": (nn.Conv2d(3, 4, 3, dilation=2), (reals(3, 8, 8),)),
        "u-net": (Of(lambda a, b, c, x: c(torch.cat([a(x), functional.interpolate(b(functional.max_pool2d(a(x), 2)),
                                                                               scale_factor=2)], 1)), 1,
                     nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 2, 1)),
                  (reals(3, 8, 8),)),
        "patches": (Of(lambda a, h, x: h(a(x).flatten(2).transpose(1, 2).mean(1)), 1, nn.Conv2d(3, 8, 4, 4),
                       linear(8, 2)), (reals(3, 8, 8),)),
        "vision transformer": (Of(lambda a, t, h, x: h(t(a(x).flatten(2).transpose(1, 2))[:, 0]), 1,
                                  nn.Conv2d(3, 16, 4, 4), encoder, linear(16, 2)), (reals(3, 8, 8),)),
        "heat map": (Of(lambda a, x: a(x).flatten(2).softmax(2).reshape(-1, 2, 6, 6), 1, nn.Conv2d(3, 2, 3)),
                     (reals(3, 8, 8),)),
        "where it is": (Of(lambda a, x: a(x).flatten(2).argmax(2), 1, nn.Conv2d(3, 2, 3)), (reals(3, 8, 8),)),
        "volume": (nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()),
                   (reals(1, 5, 5, 5),)),
        "bytes to numbers": (Of(lambda a, x: a((x.float() / 255 - 0.5).permute(0, 3, 1, 2)).mean((2, 3)), 1,
                                nn.Conv2d(3, 4, 3)), (whole(6, 6, 3, below=255),)),
        "mirrored edges": (nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 2, 3)), (reals(3, 6, 6),)),
        "local response": (nn.LocalResponseNorm(2), (reals(4, 5, 5),)),
        "bilinear sizes": (nn.Upsample(scale_factor=2, mode="bilinear"), (reals(2, 4, 4),)),
    }  # fmt: skip


def sequences() -> dict[str, Case]:
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return {
        "temporal conv": (nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU(), nn.AvgPool1d(2), nn.Flatten()),
                          (reals(4, 8),)),
        "lstm": (Of(last, 1, nn.LSTM(6, 7, batch_first=True), linear(7, 2)), (reals(5, 6),)),
        "gru both ways": (Of(last, 1, nn.GRU(6, 7, batch_first=True, bidirectional=True), linear(14, 2)),
                          (reals(5, 6),)),
        "transformer": (nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False), (reals(5, 16),)),
        "attention": (Of(lambda x: functional.scaled_dot_product_attention(x, x, x)), (reals(2, 5, 8),)),
        "class token": (Of(lambda h, x: h(torch.cat([torch.ones(1, 1, 6).expand(x.shape[0], -1, -1), x], 1).mean(1)), 1,
                           linear(6, 2)), (reals(5, 6),)),
        "mlp mixer": (Of(lambda a, b, x: b((x + a(x.transpose(1, 2)).transpose(1, 2)).mean(1)), 1, linear(5, 5),
                         linear(6, 2)), (reals(5, 6),)),
        "folded and back": (Of(lambda x: x.reshape(-1, 6).tanh().reshape(x.shape[0], 5, 6).mean(1)),
                            (reals(5, 6),)),
        "own length": (Of(masked, 2, linear(6, 2)), (reals(5, 6), whole(below=5))),
        "time reversed": (Of(lambda x: x.flip(1)), (reals(8),)),
        "plain recurrence": (Of(last, 1, nn.RNN(6, 7, batch_first=True), linear(7, 2)), (reals(5, 6),)),
        "dilated causal": (Of(lambda a, b, x: b(functional.pad(a(functional.pad(x, (2, 0))), (4, 0))), 1,
                              nn.Conv1d(4, 8, 3), nn.Conv1d(8, 2, 3, dilation=2)), (reals(4, 9),)),
        "causal attention": (Of(lambda x: functional.scaled_dot_product_attention(x, x, x, is_causal=True)),
                             (reals(2, 5, 8),)),
        "attention pooling": (Of(lambda a, x: (x * a(x).softmax(1)).sum(1), 1, linear(6, 1)), (reals(5, 6),)),
        "places": (Of(lambda a, x: a(x + torch.arange(5)[None, :, None] / 5), 1, linear(6, 2)), (reals(5, 6),)),
        "learned queries": (Of(lambda q, x: torch.einsum("qd,btd->bqt", q.weight, x).softmax(2) @ x, 1, linear(6, 3)),
                            (reals(5, 6),)),
        "differences": (Of(lambda x: x[:, 1:] - x[:, :-1]), (reals(9),)),
        "running mean": (Of(lambda x: x.cumsum(1) / torch.arange(1, 10)), (reals(9),)),
        "spectrum by matrix": (Of(lambda c, s, x: (x @ c.weight.T).pow(2) + (x @ s.weight.T).pow(2), 1, linear(8, 5),
                                  linear(8, 5)), (reals(8),)),
        "linear attention": (Of(lambda x: functional.elu(x).add(1) @ (functional.elu(x).add(1).transpose(1, 2) @ x)),
                             (reals(5, 6),)),
        "cross attention": (Of(lambda x, y: (x @ y.transpose(1, 2) / 2.4).softmax(2) @ y, 2),
                            (reals(3, 6), reals(5, 6))),
        "gated convolution": (Of(lambda a, x: functional.glu(a(x), 1), 1, nn.Conv1d(4, 8, 3)), (reals(4, 8),)),
    }  # fmt: skip


def sets() -> dict[str, Case]:
    return {
        "deep sets": (Of(lambda a, b, x: b(functional.relu(a(x)).sum(1)), 1, linear(6, 8), linear(8, 2)),
                      (reals(5, 6),)),
        "graph by matrix": (Of(lambda a, x, y: a(y @ x).relu().mean(1), 2, linear(6, 3)),
                            (reals(5, 6), reals(5, 5))),
        "largest of a set": (Of(lambda a, b, x: b(a(x).amax(1)), 1, linear(6, 8), linear(8, 2)), (reals(5, 6),)),
        "points": (Of(lambda a, x: a(x.transpose(1, 2)).amax(2), 1, nn.Conv1d(3, 8, 1)), (reals(7, 3),)),
        "distances": (Of(lambda x: (x[:, :, None] - x[:, None]).pow(2).sum(3).sqrt()), (reals(5, 3),)),
        "graph attention": (Of(lambda a, x, y: ((a(x) @ a(x).transpose(1, 2)).masked_fill(y < 0, -9.0)).softmax(2) @ x,
                               2, linear(6, 6)), (reals(5, 6), reals(5, 5))),
        "graph normalised": (Of(lambda a, x, y: a((y.abs() / y.abs().sum(2, keepdim=True)) @ x), 2, linear(6, 3)),
                             (reals(5, 6), reals(5, 5))),
        "set statistics": (Of(lambda h, x: h(torch.cat([x.mean(1), x.std(1), x.amin(1)], 1)), 1, linear(18, 2)),
                           (reals(5, 6),)),
        "ranked set": (Of(lambda x: x.sort(1)[0]), (reals(7),)),
    }  # fmt: skip


def by_place() -> dict[str, Case]:
    return {
        "picked by place": (Of(picked, 2), (reals(8), whole())),
        "rows reversed": (Of(lambda x: x.flip(0)), (reals(8),)),
        "rows rolled": (Of(lambda x: x.roll(1, 0)), (reals(8),)),
        "numbered": (Of(lambda x: x + torch.arange(x.shape[0])[:, None]), (reals(8),)),
        "divided by the count": (Of(lambda x: x / x.shape[0]), (reals(8),)),
        "rows moved up": (Of(lambda x: torch.cat([x[1:], x[:1]], 0)), (reals(8),)),
        "attention over the batch": (nn.TransformerEncoderLayer(16, 2, 32, batch_first=False), (reals(5, 16),)),
    }  # fmt: skip


def across_rows() -> dict[str, Case]:
    return {
        "batch statistics": (nn.BatchNorm1d(8, track_running_stats=False), (reals(8),)),
        "centred": (Of(lambda x: x - x.mean(0)), (reals(8),)),
        "scaled by the largest": (Of(lambda x: x / x.abs().max()), (reals(8),)),
        "softmax over the batch": (Of(lambda x: x.softmax(0)), (reals(8),)),
        "similarities": (Of(lambda x: (x @ x.T).softmax(1) @ x), (reals(8),)),
        "running total": (Of(lambda x: x.cumsum(0)), (reals(8),)),
        "trimmed to the longest": (Of(trimmed, 2, linear(6, 2)), (reals(5, 6), whole(below=5))),
        "normalised by the batch": (Of(lambda x: (x - x.mean(0)) / (x.std(0) + 1e-3)), (reals(8),)),
        "the batch's share": (Of(lambda x: x.abs() / x.abs().sum()), (reals(8),)),
        "distance between rows": (Of(lambda x: (x[:, None] - x[None]).pow(2).sum(2).mean(1)), (reals(8),)),
        "graph over rows": (Of(lambda a, x: a((x @ x.transpose(0, 1)).tanh() @ x), 1, linear(8, 2)), (reals(8),)),
        "whitened": (Of(lambda x: x @ (x.T @ x / 4)), (reals(8),)),
        "ranked in the batch": (Of(lambda x: x.sort(0)[0]), (reals(8),)),
        "largest in the batch": (Of(lambda x: x - x.amax(0, keepdim=True)), (reals(8),)),
        "padded to the longest": (Of(lambda x, lengths: x[:, :1] * lengths.max().float(), 2),
                                  (reals(8), whole(below=5))),
    }  # fmt: skip


# By kind: what is proved of all of them, and the networks.
KINDS: dict[str, tuple[RowFlow, Callable[[], dict[str, Case]]]] = {
    "rows of numbers": (INDEPENDENT, numbers),
    "ids and lookups": (INDEPENDENT, lookups),
    "images": (INDEPENDENT, images),
    "sequences": (INDEPENDENT, sequences),
    "sets and graphs": (INDEPENDENT, sets),
    "statistics and products over rows": (MIXES, across_rows),
    "by a row's place": (UNKNOWN, by_place),
}
