"""The entries of a config.pbtxt's `parameters` that are ONNX Runtime's, as Triton knows them: threads, memory.

Source: the README of Triton's ONNX Runtime backend.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from forwardpass.model.options import ModelConfig

_SHRINK = "memory.enable_memory_arena_shrinkage"
_WHOLE, _SWITCH = (r"[0-9]{1,9}", "a whole number"), (r"(?i:[01]|true|false)", "0 or 1")
# By name: the supported values, as a regular expression, and in words.
_PARAMETERS = {
    "intra_op_thread_count": _WHOLE,
    "inter_op_thread_count": _WHOLE,  # without effect: runs are sequential, and ONNX Runtime then ignores it
    "execution_mode": (r"0", "0 (one operator after the other)"),
    "enable_mem_arena": _SWITCH,
    "enable_mem_pattern": _SWITCH,
    _SHRINK: (r"(cpu:0)?", "cpu:0; a device's memory is reserved at load"),
    "gpu_mem_limit": (r"", "nothing: set the server's --gpu-mem-limit"),
    # Without effect. On CUDA they trade memory for speed; the server sets what suits its fixed buffers and graphs.
    "cudnn_conv_algo_search": (r"[0-2]", "0, 1 or 2"),
    "arena_extend_strategy": (r"[01]", "0 or 1"),
    "do_copy_in_default_stream": (r"[01]", "0 or 1"),
}


def problem(name: str, value: str) -> str:
    """What was expected instead of `value`; empty if that is supported, or if `name` is not ONNX Runtime's."""
    pattern, expected = _PARAMETERS.get(name, (r"(?s:.*)", ""))
    return "" if re.fullmatch(pattern, value) else expected


def to_options(parameters: Mapping[str, str]) -> dict[str, Any]:
    """The options of ModelConfig that these entries, without a `problem`, set."""
    off = {name for name, value in parameters.items() if value.lower() in ("0", "false")}
    return {
        "intra_op_threads": int(parameters.get("intra_op_thread_count", "0")) or None,
        "memory_arena": "enable_mem_arena" not in off,
        "memory_pattern": "enable_mem_pattern" not in off,
        "shrink_memory_arena": bool(parameters.get(_SHRINK)),
    }


def of_memory(config: ModelConfig) -> dict[str, str]:
    """The entries for the options of memory that differ from ONNX Runtime's defaults."""
    found = {}
    if not config.memory_arena:
        found["enable_mem_arena"] = "0"
    if not config.memory_pattern:
        found["enable_mem_pattern"] = "0"
    if config.shrink_memory_arena:
        found[_SHRINK] = "cpu:0"
    return found
