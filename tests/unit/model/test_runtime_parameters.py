"""ONNX Runtime's own entries among the parameters of a config.pbtxt: acted on, or refused with what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format

from forwardpass import protocol
from forwardpass.errors import ConfigError
from forwardpass.model import triton_config
from forwardpass.model.options import ModelConfig
from forwardpass.model.runtime_parameters import of_memory, problem, to_options


def test_memory_is_a_parameter_of_the_runtime(tmp_path: Path) -> None:
    def options(**parameters: str) -> tuple[bool, bool, bool]:
        message = protocol.ModelConfig()
        for key, value in parameters.items():
            message.parameters[key.replace("shrinkage", "memory.enable_memory_arena_shrinkage")].string_value = value
        (tmp_path / "config.pbtxt").write_text(text_format.MessageToString(message))
        config = triton_config.load(tmp_path / "config.pbtxt", None)
        return config.memory_arena, config.memory_pattern, config.shrink_memory_arena

    assert options(inter_op_thread_count="4") == (True, True, False)
    assert options(enable_mem_arena="0", enable_mem_pattern="False") == (False, False, False)
    assert options(enable_mem_arena="true", enable_mem_pattern="1", shrinkage="cpu:0") == (True, True, True)
    with pytest.raises(ConfigError, match=r"expected memory_arena \(enable_mem_arena\) with it"):
        options(enable_mem_arena="0", shrinkage="cpu:0")


def test_what_is_no_parameter_of_the_runtime_is_free_text() -> None:
    assert not problem("owner", "the\nteam") and not problem("", "")
    assert problem("inter_op_thread_count", "-1") == problem("inter_op_thread_count", "9" * 10) == "a whole number"


@pytest.mark.parametrize(
    ("arena", "pattern", "shrinks"), [(True, True, False), (False, False, False), (True, False, True)]
)
def test_options_of_memory_come_back_as_they_were_told(arena: bool, pattern: bool, shrinks: bool) -> None:
    config = ModelConfig(memory_arena=arena, memory_pattern=pattern, shrink_memory_arena=shrinks)
    told = of_memory(config)
    assert not any(problem(name, value) for name, value in told.items())
    again = to_options(told)
    assert (again["memory_arena"], again["memory_pattern"], again["shrink_memory_arena"]) == (arena, pattern, shrinks)
