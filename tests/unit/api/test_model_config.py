"""ModelConfig as the server tells it: complete, true, and good to be given back as a config.pbtxt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format, text_format
from tests.service import models

from forwardpass.api.model_config import describe
from forwardpass.batching.admission import Admission
from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.model import triton_config
from forwardpass.model.options import ModelConfig, TensorOptions
from forwardpass.repository.loader import LoadedModel, LoadRequest, load
from forwardpass.settings import Settings

CORES = CpuBudget(2, "for a test")
OPTIONS: dict[str, tuple[Any, ModelConfig]] = {
    "nothing said": (models.chain(), ModelConfig()),
    "batching": (
        models.chain(),
        ModelConfig(max_batch_size=16, preferred_batch_sizes=[4, 8], max_queue_delay_us=500, instances=2),
    ),
    "no batching": (models.chain(), ModelConfig(max_batch_size=16, batching=False)),
    "one at a time": (models.chain(), ModelConfig(max_batch_size=0)),
    "dependent rows": (models.centred(), ModelConfig(max_batch_size=16)),
    "fixed shape": (models.echo(shape=(2, 3)), ModelConfig()),
    "priorities": (
        models.chain(),
        ModelConfig(
            max_batch_size=4,
            priority_levels=3,
            default_priority=2,
            preserve_ordering=True,
            queue_policies={1: {"timeout_us": 7, "timeout_override": True, "max_requests": 5}},  # type: ignore[dict-item]
        ),
    ),
    "versions and words": (
        models.two_by_two(),
        ModelConfig(
            versions=[1, 3],
            graph_optimizations="basic",
            parameters={"owner": "the team"},
            outputs=[{"name": "sum"}],  # type: ignore[list-item]
            warm_up=[  # type: ignore[list-item]
                {
                    "name": "r",
                    "rows": 2,
                    "count": 3,
                    "inputs": {
                        "a": {"datatype": "FP32", "dims": [3]},
                        "n": {"datatype": "INT64", "dims": [1], "data": "random"},
                    },
                }
            ],
        ),
    ),
    "all versions": (models.chain(), ModelConfig(versions="all", max_batch_size=2)),
    "memory": (
        models.chain(),
        ModelConfig(graph_optimizations="none", memory_pattern=False, shrink_memory_arena=True),
    ),
    "reshaped": (
        models.chain(),
        ModelConfig(
            max_batch_size=8,
            inputs=[TensorOptions(name="x", dims=[2, 2], reshape=[4])],
            outputs=[TensorOptions(name="y", dims=[1, 3], reshape=[3])],
        ),
    ),
}


def loaded(folder: Path, network: Any, config: ModelConfig) -> LoadedModel:
    version = folder / "m" / "1"
    if not version.exists():
        models.save(folder, "m", network)
    settings = Settings(repository=folder, max_batch_size=32)
    return load(LoadRequest("m", "1", version, config, settings, CORES, Admission(10, 1 << 20)))


@pytest.mark.parametrize("which", OPTIONS)
def test_what_is_told_may_be_given_back(tmp_path: Path, which: str) -> None:
    """As text and as JSON; it then stands for the same options, and for the same answer."""
    first = loaded(tmp_path, *OPTIONS[which])
    told = describe(first)
    (tmp_path / "config.pbtxt").write_text(text_format.MessageToString(told))
    for config in (
        triton_config.load(tmp_path / "config.pbtxt", "m"),
        triton_config.from_json(json_format.MessageToJson(told, preserving_proto_field_name=True), "m"),
    ):
        again = loaded(tmp_path, None, config)
        assert describe(again) == told
        assert again.batches == first.batches
        assert again.worker.signature == first.worker.signature
        assert again.worker.run_rows == first.worker.run_rows
        mine, its = again.worker.options, first.worker.options
        assert (mine.instances, mine.priority_levels, mine.default_priority, mine.limits.preferred) == (
            its.instances, its.priority_levels, its.default_priority, its.limits.preferred,
        )  # fmt: skip
        assert config.versions == first.config.versions and config.warm_up == first.config.warm_up


def test_what_the_server_made_of_it_counts(tmp_path: Path) -> None:
    assert describe(loaded(tmp_path / "a", models.chain(), ModelConfig(max_batch_size=32))).max_batch_size == 32
    alone = describe(loaded(tmp_path / "b", *OPTIONS["no batching"]))
    assert alone.max_batch_size == 16 and not alone.HasField("dynamic_batching")
    dependent = describe(loaded(tmp_path / "c", models.centred(), ModelConfig(max_batch_size=16)))
    assert dependent.max_batch_size == 16 and not dependent.HasField("dynamic_batching")
    ordered = describe(loaded(tmp_path / "d", *OPTIONS["priorities"]))
    assert [group.count for group in ordered.instance_group] == [1]
    whole = describe(loaded(tmp_path / "e", models.echo(shape=(2, 3)), ModelConfig()))
    assert (whole.max_batch_size, list(whole.input[0].dims)) == (0, [2, 3])
    for config in (alone, dependent, ordered, whole):
        assert (config.name, config.platform, config.backend) == ("m", "onnxruntime_onnx", "onnxruntime")
        assert config.default_model_filename == "model.onnx"
