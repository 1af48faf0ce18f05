"""A model.toml's options for versions, tensors, queues and warm-up: what they take, and how they say no."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forwardpass.errors import ConfigError
from forwardpass.model.options import ModelConfig, OptionsOrigin, QueuePolicy, WarmUpInput, table


def load(folder: Path, text: str) -> ModelConfig:
    (folder / "model.toml").write_text(text)
    return ModelConfig.load(folder)


def test_all_of_it_in_one_file(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
        model_file = "net.onnx"
        versions = [1, 3]
        max_batch_size = 8
        priority_levels = 2
        default_priority = 2
        parameters = { owner = "the team" }
        [queue_policies.1]
        timeout_us = 500
        timeout_override = true
        max_requests = 4
        [[inputs]]
        name = "x"
        datatype = "FP32"
        dims = [4]
        [[outputs]]
        name = "y"
        labels = "labels.txt"
        [[warm_up]]
        rows = 4
        [warm_up.inputs.x]
        datatype = "FP32"
        dims = [4]
        data = "file"
        file = "x.raw"
        """,
    )
    assert (config.model_file, config.versions, config.parameters) == ("net.onnx", [1, 3], {"owner": "the team"})
    assert config.queue_policies == {1: QueuePolicy(timeout_us=500, timeout_override=True, max_requests=4)}
    assert (config.inputs[0].dims, config.outputs[0].labels) == ([4], "labels.txt")
    (request,) = config.warm_up
    assert request.inputs["x"] == WarmUpInput(datatype="FP32", dims=[4], data="file", file="x.raw")


@pytest.mark.parametrize(("said", "versions"), [("1", 1), ("7", 7), ('"all"', "all"), ("[2, 1]", [2, 1])])
def test_versions(tmp_path: Path, said: str, versions: Any) -> None:
    assert load(tmp_path, f"versions = {said}").versions == versions


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *(
            (f"versions = {v}", 'versions: expected "all", a number of at least 1, or a list of such')
            for v in ("0", "-1", '"latest"', "[]", "[0]", '["1"]', "true", "1.5")
        ),
        ("default_priority = 2", "default_priority: expected 1 to priority_levels, 1, got 2"),
        (
            "[queue_policies.2]\nmax_requests = 1",
            "queue_policies: expected priorities of 1 to priority_levels, 1, got 2",
        ),
        ("[queue_policies.1]\nmax_rows = 1", "queue_policies.1.max_rows: Extra inputs are not permitted"),
        ("max_batch_size = 4\npreferred_batch_sizes = [8]", "preferred_batch_sizes: 8 is more than max_batch_size, 4"),
        ("preferred_batch_sizes = [0]", "preferred_batch_sizes: expected at least 1 row"),
        ('model_file = "../net.onnx"', "model_file: expected the name of a file, without a path"),
        ('model_file = ".."', "model_file: expected the name of a file, without a path"),
        ('graph_optimizations = "most"', "graph_optimizations: Input should be 'all', 'extended', 'basic' or 'none'"),
        ('[[inputs]]\nname = "x"\n[[inputs]]\nname = "x"', "inputs: 'x' is named twice"),
        ('[[inputs]]\nname = "x"\ndims = [-2]', "inputs.0.dims.0: Input should be greater than or equal to -1"),
        ("[[inputs]]\ndims = [1]", "inputs.0.name: Field required"),
        ("[[warm_up]]\nrows = 1", "warm_up.0.inputs: Field required"),
        ('[[warm_up]]\n[warm_up.inputs.x]\ndatatype = "FP32"\ndims = [1]\ndata = "file"', "expected `file` with data"),
        (
            '[[warm_up]]\n[warm_up.inputs.x]\ndatatype = "FP32"\ndims = [1]\ndata = "file"\nfile = "/etc/passwd"',
            "file: expected the name of a file, without a path",
        ),
        ("batch = 1", "batch is not an option; the options are max_batch_size, "),
    ],
)
def test_what_is_wrong_is_told_by_name(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'model.toml'}: ") and reason in str(caught.value)


def test_options_know_where_they_were_read() -> None:
    config = ModelConfig()
    assert config.where("versions") == "model.toml: versions"
    told = config.read_from(OptionsOrigin("m/config.pbtxt", {"versions": 7}, {"versions": "version_policy"}))
    assert told.where("versions") == "m/config.pbtxt:7: version_policy"
    assert told.where("labels") == "m/config.pbtxt: labels"


def test_the_table_has_every_option() -> None:
    assert all(f"| `{name}` |" in table() for name in ModelConfig.model_fields)
