"""Networks as people write them, exported by PyTorch: what is proved of their rows, against what running them says."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from forwardpass.execution.onnx_runtime import ort
from forwardpass.model.row_flow import RowFlow, prove

INDEPENDENT, MIXES, UNKNOWN = RowFlow.INDEPENDENT, RowFlow.MIXES, RowFlow.UNKNOWN
BATCH = 4


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


Case = tuple[nn.Module, tuple[Any, ...], tuple[RowFlow, ...]]


def cases() -> dict[str, Case]:
    linear = nn.Linear
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    one = (INDEPENDENT,)
    return {
        "mlp": (nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 3), nn.Softmax(1)), (reals(8),), one),
        "residual mlp": (Of(lambda a, b, x: x + b(functional.gelu(a(x))), 1, linear(8, 16), linear(16, 8)),
                         (reals(8),), one),
        "batch norm": (nn.Sequential(linear(8, 8), nn.BatchNorm1d(8), nn.SiLU()), (reals(8),), one),
        "layer norm": (nn.Sequential(nn.LayerNorm(8), nn.Mish(), linear(8, 2)), (reals(8),), one),
        "rms norm": (nn.Sequential(nn.RMSNorm(8), linear(8, 2)), (reals(8),), one),
        "dropout": (nn.Sequential(linear(8, 8), nn.Dropout(0.5), nn.ELU()), (reals(8),), one),
        "glu": (nn.Sequential(linear(8, 8), nn.GLU(1)), (reals(8),), one),
        "autoencoder": (nn.Sequential(linear(8, 2), nn.Tanh(), linear(2, 8), nn.Sigmoid()), (reals(8),), one),
        "normalised": (Of(lambda x: functional.normalize(x, dim=1)), (reals(8),), one),
        "standardised": (Of(lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)), (reals(8),), one),
        "cross network": (Of(cross, 1, linear(8, 8), linear(8, 8)), (reals(8),), one),
        "two towers": (Of(lambda a, b, x, y: (a(x) * b(y)).sum(1), 2, linear(8, 4), linear(6, 4)),
                       (reals(8), reals(6)), one),
        "wide and deep": (Of(widths, 2, nn.Embedding(8, 3), linear(11, 2)), (whole(2), reals(5)), one),
        "embedding": (Of(lambda e, h, i: h(e(i).mean(1)), 1, nn.Embedding(8, 4), linear(4, 2)), (whole(3),), one),
        "mixture of experts": (Of(moe, 1, linear(8, 2), linear(8, 4), linear(8, 4)), (reals(8),), one),
        "factorisation machine": (Of(lambda v, x: v(x).pow(2).sum(1) - (v(x.pow(2))).sum(1), 1, linear(8, 4)),
                                  (reals(8),), one),
        "lenet": (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), linear(36, 3)),
                  (reals(1, 8, 8),), one),
        "conv and pool": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.AdaptiveAvgPool2d(1),
                                        nn.Flatten(), linear(8, 2)), (reals(3, 9, 9),), one),
        "depthwise": (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Hardswish(), nn.Conv2d(4, 2, 1)),
                      (reals(4, 6, 6),), one),
        "squeeze and excite": (Of(lambda a, x: x * torch.sigmoid(a(x.mean((2, 3))))[:, :, None, None], 1, linear(4, 4)),
                               (reals(4, 5, 5),), one),
        "group norm": (nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.SiLU()), (reals(4, 6, 6),), one),
        "instance norm": (nn.InstanceNorm2d(4), (reals(4, 5, 5),), one),
        "upsampled": (Of(lambda x: functional.interpolate(x, scale_factor=2)), (reals(3, 4, 4),), one),
        "pixel shuffle": (Of(lambda x: functional.pixel_shuffle(x, 2)), (reals(8, 3, 3),), one),
        "transposed conv": (nn.Sequential(nn.ConvTranspose2d(4, 2, 2, 2), nn.LeakyReLU()), (reals(4, 3, 3),), one),
        "temporal conv": (nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU(), nn.AvgPool1d(2), nn.Flatten()),
                          (reals(4, 8),), one),
        "lstm": (Of(last, 1, nn.LSTM(6, 7, batch_first=True), linear(7, 2)), (reals(5, 6),), one),
        "gru both ways": (Of(last, 1, nn.GRU(6, 7, batch_first=True, bidirectional=True), linear(14, 2)),
                          (reals(5, 6),), one),
        "transformer": (nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False), (reals(5, 16),), one),
        "attention": (Of(lambda x: functional.scaled_dot_product_attention(x, x, x)), (reals(2, 5, 8),), one),
        "class token": (Of(lambda h, x: h(torch.cat([torch.ones(1, 1, 6).expand(x.shape[0], -1, -1), x], 1).mean(1)), 1,
                           linear(6, 2)), (reals(5, 6),), one),
        "mlp mixer": (Of(lambda a, b, x: b((x + a(x.transpose(1, 2)).transpose(1, 2)).mean(1)), 1, linear(5, 5),
                         linear(6, 2)), (reals(5, 6),), one),
        "deep sets": (Of(lambda a, b, x: b(functional.relu(a(x)).sum(1)), 1, linear(6, 8), linear(8, 2)),
                      (reals(5, 6),), one),
        "graph by matrix": (Of(lambda a, x, y: a(y @ x).relu().mean(1), 2, linear(6, 3)),
                            (reals(5, 6), reals(5, 5)), one),
        "folded and back": (Of(lambda x: x.reshape(-1, 6).tanh().reshape(x.shape[0], 5, 6).mean(1)),
                            (reals(5, 6),), one),
        "chunks": (Of(lambda x: sum(part.tanh() for part in x.chunk(2, 1))), (reals(8),), one),
        "largest two": (Of(lambda x: x.topk(2, 1)[0]), (reals(8),), one),
        "one hot": (Of(lambda i: functional.one_hot(i, 8).float()), (whole(),), one),
        "gathered": (Of(lambda x, i: x.gather(1, i), 2), (reals(8), whole(2)), one),
        "own length": (Of(masked, 2, linear(6, 2)), (reals(5, 6), whole(below=5)), one),
        "time reversed": (Of(lambda x: x.flip(1)), (reals(8),), one),
        "picked by place": (Of(picked, 2), (reals(8), whole()), (UNKNOWN,)),
        "rows reversed": (Of(lambda x: x.flip(0)), (reals(8),), (UNKNOWN,)),
        "rows rolled": (Of(lambda x: x.roll(1, 0)), (reals(8),), (UNKNOWN,)),
        "numbered": (Of(lambda x: x + torch.arange(x.shape[0])[:, None]), (reals(8),), (UNKNOWN,)),
        "divided by the count": (Of(lambda x: x / x.shape[0]), (reals(8),), (UNKNOWN,)),
        "batch statistics": (nn.BatchNorm1d(8, track_running_stats=False), (reals(8),), (MIXES,)),
        "centred": (Of(lambda x: x - x.mean(0)), (reals(8),), (MIXES,)),
        "scaled by the largest": (Of(lambda x: x / x.abs().max()), (reals(8),), (MIXES,)),
        "softmax over the batch": (Of(lambda x: x.softmax(0)), (reals(8),), (MIXES,)),
        "similarities": (Of(lambda x: (x @ x.T).softmax(1) @ x), (reals(8),), (MIXES,)),
        "running total": (Of(lambda x: x.cumsum(0)), (reals(8),), (MIXES,)),
        "trimmed to the longest": (Of(trimmed, 2, linear(6, 2)), (reals(5, 6), whole(below=5)), (MIXES,)),
        "attention over the batch": (nn.TransformerEncoderLayer(16, 2, 32, batch_first=False), (reals(5, 16),),
                                     (MIXES, UNKNOWN)),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", cases())
def test_what_is_proved_is_what_running_says(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, inputs, flows = cases()[name]
    path = tmp_path / "model.onnx"
    batch = torch.export.Dim("batch")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        torch.onnx.export(
            network.eval(), inputs, str(path), dynamo=True, external_data=False,
            dynamic_shapes=tuple({0: batch} for _ in inputs),
        )  # fmt: skip
    proof = prove(path)
    assert proof.flow in flows, proof
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    rng = np.random.default_rng(0)
    rows = [np.asarray(tensor) for tensor in inputs]

    def run(arrays: list[Any]) -> Any:
        return session.run(None, dict(zip(names, arrays, strict=True)))[0]

    base = run(rows)
    independent = True
    for keeps in range(BATCH):
        others = [rng.permutation(array) if array.dtype.kind == "i" else array[::-1] * 3 - 1 for array in rows]
        others = [np.ascontiguousarray(other.astype(array.dtype)) for other, array in zip(others, rows, strict=True)]
        for other, array in zip(others, rows, strict=True):
            other[keeps] = array[keeps]
        independent &= bool(np.allclose(run(others)[keeps], base[keeps], rtol=1e-4, atol=1e-5))
        independent &= bool(
            np.allclose(run([a[keeps : keeps + 1] for a in rows])[0], base[keeps], rtol=1e-4, atol=1e-5)
        )
    if proof.flow is INDEPENDENT:
        assert independent
    elif proof.flow is MIXES:
        assert not independent
