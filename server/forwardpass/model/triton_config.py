"""Converts Triton's config.pbtxt (text), or the same as JSON, to our ModelConfig. Pure, except for reading that file.

It is parsed by protobuf itself. Every option that is set and not supported is rejected with its line; none is silently
ignored. `triton_options` has the tables of options.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from google.protobuf import json_format, text_format
from pydantic import ValidationError

from forwardpass import protocol
from forwardpass.errors import ConfigError, printable
from forwardpass.model import runtime_parameters
from forwardpass.model.options import ModelConfig, OptionsOrigin, TensorOptions
from forwardpass.model.pbtxt_lines import TextNode, read_lines
from forwardpass.model.triton_options import BECAUSE, SLOWER_WITHOUT, child, unsupported

FILE_NAME = "config.pbtxt"
PLATFORM = "onnxruntime_onnx"  # Triton's name for a model of this kind; clients compare it
BACKEND = "onnxruntime"
RUNTIMES = ("libtriton_onnxruntime.so", "onnxruntime")  # files of that backend
GRAPH_LEVELS = {"basic": -1, "all": 0, "extended": 1, "none": 2}  # graph_optimizations -> optimization.graph.level


def load(path: Path, name: str | None, ignore_unsupported: bool = False) -> ModelConfig:
    """The options in a config.pbtxt. `name`: the name that the model must have, if known.

    `ignore_unsupported`: what is not supported and changes no answer goes into `origin.ignored` instead of an error.
    Raises ConfigError naming the file, the line, the option, the expected and the actual value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    message = protocol.ModelConfig()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        said = str(error).replace("\n", " ")
        raise ConfigError(f"{path}:{said}" if said[:1].isdigit() else f"{path}: {said}") from None
    root = read_lines(text)
    return _Reader(str(path), root, ignore_unsupported).config(message, name, "max_batch_size" in root.children)


def from_json(text: str, name: str | None, ignore_unsupported: bool = False) -> ModelConfig:
    """The options in a ModelConfig as JSON, as RepositoryModelLoad carries it; as `load`. Raises ConfigError."""
    message = protocol.ModelConfig()
    try:
        said = json.loads(text)
        if not isinstance(said, dict):
            raise ValueError(f"expected an object, got {text[:20]!r}")
        json_format.ParseDict(said, message)
    except (ValueError, json_format.ParseError, RecursionError) as error:
        reason = str(error).partition(" Available Fields")[0]
        raise ConfigError(f"config: not a ModelConfig as JSON: {printable(reason.strip(), 300)}") from None
    reader = _Reader("config", None, ignore_unsupported)
    return reader.config(message, name, not {"max_batch_size", "maxBatchSize"}.isdisjoint(said))


def model_name(path: Path) -> str:
    """The model's name in a config.pbtxt; empty if it has none or cannot be read."""
    message = protocol.ModelConfig()
    try:
        text_format.Parse(path.read_text(encoding="utf-8"), message)
    except (OSError, UnicodeDecodeError, text_format.ParseError):
        return ""
    return str(message.name)


class _Reader:
    """Converts one of Triton's ModelConfig messages to ours, with the line of every option."""

    def __init__(self, file: str, root: TextNode | None, ignores: bool) -> None:
        self._file = file
        self._ignores = ignores
        self._ignored: list[str] = []
        self._root = root
        self._lines: dict[str, int] = {}
        self._options: dict[str, Any] = {}
        self._paths: dict[str, str] = {}  # our name of an option -> its path in the message

    def config(self, message: Any, name: str | None, sized: bool) -> ModelConfig:
        """Convert the message. `sized`: max_batch_size is in the file, even if 0."""
        for path, node in unsupported(message, self._root, ""):
            because = next((why for start, why in BECAUSE.items() if path.startswith(start)), "")
            text = f"{path} is not supported{because and ': ' + because}"
            optional = path.startswith(SLOWER_WITHOUT)
            if optional and self._ignores:
                self._ignored.append(f"{self._place(node)}: {text}; ignored, as --ignore-unsupported says")
            else:
                self._fail(node, text + "; --ignore-unsupported serves the model without it" * optional)
        self._identity(message, name)
        self._tensors(message)
        self._batching(message, sized)
        self._versions(message)
        self._instances(message)
        self._rest(message)
        try:
            config = ModelConfig(**self._options)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            option = str(first["loc"][0]) if first["loc"] else ""
            text = str(first["msg"]).removeprefix("Value error, ")
            option = option or text.partition(":")[0]
            path = self._paths.get(option, option)
            if not first["loc"]:
                text = text.replace(option, path, 1)
            else:
                text = f"{path}: {text}" + ("" if first["type"] == "value_error" else f", got {first['input']!r}")
            self._fail(self._at(path), text)
        return config.read_from(OptionsOrigin(self._file, self._lines, self._paths, message, tuple(self._ignored)))

    # -- part by part -----------------------------------------------------------------------------------------------

    def _identity(self, message: Any, name: str | None) -> None:
        if message.name and name is not None and message.name != name:
            self._fail(self._at("name"), f"name: expected {name!r}, as the folder is called, got {message.name!r}")
        for option, known in (("platform", PLATFORM), ("backend", BACKEND)):
            value = getattr(message, option)
            if value not in ("", known):
                self._fail(self._at(option), f"{option}: expected {known!r}, got {value!r}; only ONNX files are served")
        if message.runtime not in ("", *RUNTIMES):
            expected = f"expected nothing or {RUNTIMES[0]!r}"
            self._fail(self._at("runtime"), f"runtime: {expected}, got {message.runtime!r}; ONNX Runtime is built in")
        if message.default_model_filename:
            self._set("model_file", message.default_model_filename, "default_model_filename")

    def _tensors(self, message: Any) -> None:
        for what, tensors in (("input", message.input), ("output", message.output)):
            found = []
            for i, tensor in enumerate(tensors):
                node = self._at(what, i)
                if not tensor.name:
                    self._fail(node, f"{what}: one of them has no name")
                if any(size == 0 or size < -1 for size in tensor.dims):
                    at = child(node, "dims") or node
                    self._fail(
                        at,
                        f"{what}.dims of '{tensor.name}': expected sizes of at least 1, or -1 for any, "
                        f"got {list(tensor.dims)}",
                    )
                kind = protocol.BY_CONFIG_TYPE.get(_name_of("DataType", tensor.data_type))
                entry: dict[str, Any] = {"name": tensor.name, "datatype": kind and kind.name}
                entry["dims"] = list(tensor.dims) or None
                if tensor.HasField("reshape"):
                    entry["reshape"] = list(tensor.reshape.shape)
                    try:
                        TensorOptions(**entry)
                    except ValidationError as error:
                        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
                        self._fail(child(node, "reshape") or node, f"{what}.{reason} of '{tensor.name}'")
                if what == "input":
                    entry["optional"] = tensor.optional
                entry["labels"] = tensor.label_filename or None if what == "output" else None
                found.append(entry)
                self._remember(f"{what} '{tensor.name}'", node)
            if found:
                self._set(f"{what}s", found, what)

    def _batching(self, message: Any, sized: bool) -> None:
        size = message.max_batch_size
        if size < 0:
            self._fail(self._at("max_batch_size"), f"max_batch_size: expected at least 0, got {size}")
        # As in Triton: if absent, it is completed from the network, unless inputs or outputs are declared.
        completed = not sized and not message.input and not message.output
        if not completed:
            self._set("max_batch_size", size)
        if not message.HasField("dynamic_batching"):
            # As in Triton: without this block, requests share runs only if the configuration is completed from the
            # network, which needs inputs or outputs to be absent.
            self._set("batching", completed or (size > 1 and not (message.input and message.output)))
            return
        batching, at = message.dynamic_batching, "dynamic_batching"
        if not completed and not size:
            self._fail(self._at(at), "dynamic_batching: expected max_batch_size of at least 1 with it, got 0")
        self._set("preferred_batch_sizes", list(batching.preferred_batch_size), f"{at}.preferred_batch_size")
        self._set("max_queue_delay_us", batching.max_queue_delay_microseconds, f"{at}.max_queue_delay_microseconds")
        self._set("preserve_ordering", batching.preserve_ordering, f"{at}.preserve_ordering")
        levels, default = batching.priority_levels, batching.default_priority_level
        if levels:
            if not 1 <= default <= levels:
                node = self._at(f"{at}.default_priority_level") or self._at(f"{at}.priority_levels")
                self._fail(node, f"{at}.default_priority_level: expected 1 to {levels}, got {default}")
            self._set("priority_levels", levels, f"{at}.priority_levels")
            self._set("default_priority", default, f"{at}.default_priority_level")
        self._policies(batching, max(levels, 1))

    def _policies(self, batching: Any, levels: int) -> None:
        at = "dynamic_batching"
        for priority in batching.priority_queue_policy:
            if not 1 <= priority <= batching.priority_levels:
                node = self._at(f"{at}.priority_queue_policy", str(priority))
                self._fail(
                    node,
                    f"{at}.priority_queue_policy: expected priorities of 1 to priority_levels, "
                    f"{batching.priority_levels}, got {priority}",
                )
        if not batching.HasField("default_queue_policy") and not batching.priority_queue_policy:
            # Without a policy Triton ignores a request's own timeout; here it applies, since the client sent it.
            return
        policies = {}
        for priority in range(1, levels + 1):
            policy, path = batching.default_queue_policy, f"{at}.default_queue_policy"
            node = self._at(path)
            if priority in batching.priority_queue_policy:
                policy, path = batching.priority_queue_policy[priority], f"{at}.priority_queue_policy"
                node = self._at(path, str(priority))
                node = child(node, "value") or node
            if policy.timeout_action:
                self._fail(
                    child(node, "timeout_action") or node,
                    f"{path}.timeout_action: expected REJECT, got DELAY, which is not supported",
                )
            policies[priority] = {
                "timeout_us": policy.default_timeout_microseconds,
                "timeout_override": policy.allow_timeout_override,
                "max_requests": policy.max_queue_size,
            }
        self._set("queue_policies", policies, f"{at}.default_queue_policy")

    def _versions(self, message: Any) -> None:
        policy = message.version_policy
        match policy.WhichOneof("policy_choice"):
            case "latest":
                self._set("versions", policy.latest.num_versions or 1, "version_policy")
            case "all":
                self._set("versions", "all", "version_policy")
            case "specific":
                self._set("versions", list(policy.specific.versions), "version_policy")

    def _instances(self, message: Any) -> None:
        groups, path = message.instance_group, "instance_group"
        if not groups:
            return
        kinds: dict[str, None] = {}
        each: Counter[int] = Counter()  # instances by device; -1: any device
        for i, group in enumerate(groups):
            kind, node = _name_of("ModelInstanceGroup.Kind", group.kind), self._at(path, i)
            if kind == "KIND_MODEL" or group.count < 0:
                what = f"count: expected at least 0, got {group.count}" if group.count < 0 else f"kind: got {kind}"
                self._fail(node, f"{path}.{what}; expected KIND_CPU, KIND_AUTO or KIND_GPU")
            devices = list(group.gpus)
            if devices and (kind == "KIND_CPU" or len(set(devices)) < len(devices) or min(devices) < 0):
                self._fail(child(node, "gpus"), f"{path}.gpus: expected devices of KIND_GPU, each once, got {devices}")
            kinds["KIND_GPU" if devices else kind] = None
            for device in devices or (-1,):
                each[device] += group.count or 1
        if len(kinds) > 1 or (-1 in each and len(each) > 1):
            self._fail(self._at(path), f"{path}: expected one kind for all groups, with devices in each or in none")
        if len(set(each.values())) > 1:
            self._fail(self._at(path), f"{path}: expected as many instances on each device, got {dict(each)}")
        (kind,) = kinds
        numbers = ",".join(str(device) for device in sorted(each) if device >= 0)
        self._set("provider", {"KIND_CPU": "cpu", "KIND_GPU": f"cuda:{numbers}".rstrip(":")}.get(kind), path)
        self._set("instances", next(iter(each.values())), path)

    def _rest(self, message: Any) -> None:
        level, at = message.optimization.graph.level, "optimization.graph.level"
        allowed = next((name for name, its in GRAPH_LEVELS.items() if its == level), None)
        if allowed is None:
            self._fail(self._at(at), f"{at}: expected -1 (basic), 0 (all), 1 (extended) or 2 (none), got {level}")
        self._set("graph_optimizations", allowed, at)
        self._parameters({key: value.string_value for key, value in message.parameters.items()})
        warm_ups = []
        for i, sample in enumerate(message.model_warmup):
            inputs = {}
            for name, given in sample.inputs.items():
                data = given.WhichOneof("input_data_type")
                kind = protocol.BY_CONFIG_TYPE.get(_name_of("DataType", given.data_type))
                if kind is None or data is None or (data != "input_data_file" and not getattr(given, data)):
                    wanted = "data_type" if kind is None else "zero_data, random_data or input_data_file"
                    self._fail(self._at("model_warmup", i), f"model_warmup.inputs '{name}': expected {wanted}")
                inputs[name] = {
                    "datatype": kind.name,
                    "dims": list(given.dims),
                    "data": data.removesuffix("_data") if data != "input_data_file" else "file",
                    "file": given.input_data_file or None,
                }
            warm_ups.append(
                {"name": sample.name, "rows": sample.batch_size or 1, "count": sample.count or 1, "inputs": inputs}
            )
        self._set("warm_up", warm_ups, "model_warmup")

    def _parameters(self, parameters: dict[str, str]) -> None:
        """Act on those that are ONNX Runtime's; the others are free text."""
        self._set("parameters", parameters)
        for name, value in parameters.items():
            expected = runtime_parameters.problem(name, value)
            if expected:
                self._fail(self._at("parameters", name), f"parameters.{name}: expected {expected}, got {value!r}")
        for option, given in runtime_parameters.to_options(parameters).items():
            self._set(option, given, "parameters")

    # -- lines ------------------------------------------------------------------------------------------------------

    def _set(self, option: str, value: Any, path: str = "") -> None:
        self._options[option] = value
        self._paths[option] = path or option
        self._remember(option, self._at(path or option))

    def _remember(self, option: str, node: TextNode | None) -> None:
        if node is not None:
            self._lines[option] = node.line

    def _at(self, path: str, place: int | str = 0) -> TextNode | None:
        """The node of a path in the file; of several entries, the `place`-th, or the one with that key."""
        node = self._root
        *above, last = path.split(".")
        for name in above:
            node = child(node, name)
        return child(node, last, place)

    def _fail(self, node: TextNode | None, text: str) -> NoReturn:
        raise ConfigError(f"{self._place(node)}: {text}")

    def _place(self, node: TextNode | None) -> str:
        return f"{self._file}:{node.line}" if node is not None else self._file


def _name_of(enum: str, number: int) -> str:
    """The name of an enum's value; the number if it has none."""
    found = protocol.POOL.FindEnumTypeByName(f"inference.{enum}").values_by_number.get(number)
    return str(found.name) if found is not None else str(number)
