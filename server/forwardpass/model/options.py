"""One model's serving options: the contents of `model.toml`, also made from a `config.pbtxt` (see triton_config).

Every option has a meaning, a unit and a working default; unknown options are rejected by name, never ignored. Options
that depend on the server's own settings are None here and decided when the model is loaded.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from forwardpass.errors import ConfigError
from forwardpass.model.contract import MODEL_FILE

FILE_NAME = "model.toml"

Positive = Annotated[int, Field(ge=1)]
Dim = Annotated[int, Field(ge=-1)]


def plain_name(name: str) -> str:
    """Return `name` if it is a plain file name, which can't lead outside its folder. Raises ValueError."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"expected the name of a file, without a path, got {name!r}")
    return name


@dataclasses.dataclass(frozen=True, slots=True)
class OptionsOrigin:
    """Where options were read. `lines` and `names` map each option to its line and its name in that file.

    `given` is the parsed message of a config.pbtxt, or of a ModelConfig in a request.
    """

    file: str = FILE_NAME
    lines: Mapping[str, int] = dataclasses.field(default_factory=dict)
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    given: Any = None  # inference.ModelConfig
    ignored: tuple[str, ...] = ()  # what is not supported and was told to be ignored, for the log


class _OptionsPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorOptions(_OptionsPart):
    """The options of one input or output; they are checked against the network."""

    name: str = Field(min_length=1)
    datatype: str | None = None  # "FP32"; None: the network's
    dims: list[Dim] | None = None  # of one row if the model batches, else the whole shape; None: the network's
    reshape: list[Dim] | None = None  # the network's shape, where `dims`, which clients see, is another; as dims
    labels: str | None = None  # a file in the model's folder with one label per line; outputs only
    optional: bool = False  # requests leave it out, and the network's own default counts; inputs only

    @model_validator(mode="after")
    def _as_large(self) -> Self:
        if self.reshape is None:
            return self
        unknown = [shape.count(-1) for shape in (self.dims or [], self.reshape)]
        sizes = [math.prod(size for size in shape if size != -1) for shape in (self.dims or [], self.reshape)]
        if self.dims is None or unknown[0] != unknown[1] or unknown[0] > 1 or sizes[0] != sizes[1]:
            raise ValueError(
                f"reshape: expected as many elements as in dims, {self.dims}, and -1 at most once and in both, "
                f"got {self.reshape}"
            )
        return self


class QueuePolicy(_OptionsPart):
    """The queue's limits at one priority. 0: no limit."""

    timeout_us: int = Field(0, ge=0)  # how long a request may wait for an instance
    timeout_override: bool = False  # a request's own `timeout` may shorten that
    max_requests: int = Field(0, ge=0)


class WarmUpInput(_OptionsPart):
    """One input of a made-up request: zeros, random values, or one row (or all rows) of raw elements from a file."""

    datatype: str
    dims: list[Annotated[int, Field(ge=0)]]
    data: Literal["zero", "random", "file"] = "zero"
    file: str | None = None  # in `warmup` in the model's folder

    @field_validator("file")
    @classmethod
    def _inside(cls, name: str | None) -> str | None:
        return None if name is None else plain_name(name)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.data == "file") != (self.file is not None):
            raise ValueError('expected `file` with data = "file", and only then')
        return self


class WarmUp(_OptionsPart):
    """A request that is run `count` times before the model is ready."""

    name: str = ""
    rows: int = Field(1, ge=1)
    count: int = Field(1, ge=1)
    inputs: dict[str, WarmUpInput] = Field(min_length=1)


class ModelConfig(BaseModel):
    """Options of one model, for all its versions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_batch_size: int | None = Field(
        None, ge=0, description="Rows in one matrix; 0 serves one request at a time. Unset: the server's setting."
    )
    max_queue_delay_us: int = Field(
        0,
        ge=0,
        le=10_000_000,
        description="Microseconds that a batch which is not full may wait for more rows. 0, the default, takes what is "
        "there whenever an instance is idle; under load batches form by themselves.",
    )
    preferred_batch_sizes: list[int] = Field(
        default_factory=list,
        description="With a queue delay: a batch of one of these row counts does not wait further.",
    )
    max_queue_rows: int = Field(
        8192,
        ge=1,
        description="Rows that may wait; a request that exceeds it is refused. Requests of more rows than "
        "max_batch_size that run in slices have bounds of their own: this one, or twice max_request_rows if "
        "that is more.",
    )
    max_queue_requests: int = Field(4096, ge=1, description="Requests that may wait; one more is refused.")
    max_queue_bytes: int = Field(256 << 20, ge=1024, description="Bytes of requests that may wait.")
    max_request_rows: int = Field(
        65536,
        ge=1,
        description="Rows of the largest single request. Beyond max_batch_size it is run in slices, where rows are "
        "independent, by turns with other requests; otherwise it is refused.",
    )
    deadline_scheduling: bool = Field(
        True,
        description="Let near deadlines go first and refuse what cannot make its own. Off: first come, first served.",
    )
    default_timeout_us: int = Field(
        0,
        ge=0,
        description="Queue timeout: microseconds that a request may wait for an instance, however long its run takes; "
        "0: no limit. A request's own `timeout` may shorten it.",
    )
    priority_levels: int = Field(
        1, ge=1, le=64, description="How many priorities requests may ask for; 1 is the highest."
    )
    default_priority: int = Field(1, ge=1, le=64, description="Priority of a request that asks for none.")
    instances: int | None = Field(
        None,
        ge=1,
        le=256,
        description="Runs of this model at the same time; on CUDA on each device, where two let the copies of a batch "
        "go on beside the run of another. Unset: the server's setting.",
    )
    intra_op_threads: int | None = Field(
        None, ge=1, le=1024, description="Threads inside one run. Unset: the server chooses, and prints the reason."
    )
    provider: str | None = Field(
        None,
        description="auto, cpu, cuda, cuda:N or, on several devices with one queue, cuda:N,M; openvino. Unset: "
        "the server's setting.",
    )
    allow_tf32: bool | None = Field(
        None,
        description="On CUDA, let products of 32-bit floats keep 10 bits of their mantissa (TF32). Unset: the server's "
        "setting.",
    )
    batch_invariance: bool | None = Field(
        None,
        description="Whether a row's answer is the same alone and in a batch. Unset: no, where the contract or the "
        "network's graph shows it; else probed at load. true or false asserts it, against both too, and is printed as "
        "an assertion.",
    )
    labels: str | None = Field(None, description="A file beside this one with one class label a line.")
    model_file: str = Field(MODEL_FILE, description="The network's file in a version's folder.")
    versions: Literal["all"] | int | list[int] = Field(
        1, description='Which versions are served: a number: so many of the latest; a list: exactly these; "all".'
    )
    batching: bool = Field(
        True,
        description="Whether requests share a run. Off: each runs alone, in runs of at most max_batch_size rows.",
    )
    preserve_ordering: bool = Field(
        False, description="Answer in the order of arrival: first come, first served, one run at a time."
    )
    queue_policies: dict[Positive, QueuePolicy] = Field(
        default_factory=dict,
        description="By priority: timeout_us (a queue timeout), timeout_override (whether a request's own timeout may "
        "shorten it) and max_requests. A priority without one has the model's limits.",
    )
    graph_optimizations: Literal["all", "extended", "basic", "none"] = Field(
        "all", description="What ONNX Runtime may do to the network when it is opened."
    )
    memory_arena: bool = Field(
        True,
        description="On the CPU, keep the memory of a run for later runs. Off: it is given back, and runs are slower.",
    )
    memory_pattern: bool = Field(
        True, description="On the CPU, allocate the memory of a run of known sizes in one piece."
    )
    shrink_memory_arena: bool = Field(
        False,
        description="On the CPU, give unused memory of the arena back after every run. For networks whose largest run "
        "is rare.",
    )
    inputs: list[TensorOptions] = Field(
        default_factory=list,
        description="name, datatype and dims (of one row) of each input, held against the network. Empty: as the "
        "network has them. `reshape`: the network's shape, where `dims`, which clients see, is another of as many "
        "elements.",
    )
    outputs: list[TensorOptions] = Field(
        default_factory=list,
        description="The same of the outputs, and `labels`, a file with one label a line. An output that is left out "
        "is computed where a request names it.",
    )
    warm_up: list[WarmUp] = Field(
        default_factory=list,
        description="Requests that are run before the model is ready: rows, count, and for each input its datatype, "
        'dims (of one row) and data: "zero", "random" or "file", with the file\'s name in the folder `warmup`.',
    )
    parameters: dict[str, str] = Field(default_factory=dict, description="Free text, shown in the model's metadata.")
    _origin: OptionsOrigin = PrivateAttr(default_factory=OptionsOrigin)

    @field_validator("versions", mode="before")
    @classmethod
    def _known(cls, versions: object) -> object:
        numbers = versions if isinstance(versions, list) else [versions]
        if versions == "all" or (numbers and all(type(n) is int and n >= 1 for n in numbers)):
            return versions
        raise ValueError(f'expected "all", a number of at least 1, or a list of such, got {versions!r}')

    @field_validator("model_file")
    @classmethod
    def _plain(cls, name: str) -> str:
        return plain_name(name)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        levels = self.priority_levels
        if self.default_priority > levels:
            raise ValueError(f"default_priority: expected 1 to priority_levels, {levels}, got {self.default_priority}")
        beyond = [p for p in self.queue_policies if p > levels]
        if beyond:
            raise ValueError(f"queue_policies: expected priorities of 1 to priority_levels, {levels}, got {beyond[0]}")
        for what, tensors in (("inputs", self.inputs), ("outputs", self.outputs)):
            names = [t.name for t in tensors]
            twice = [n for n in names if names.count(n) > 1]
            if twice:
                raise ValueError(f"{what}: '{twice[0]}' is named twice")
        if self.shrink_memory_arena and not self.memory_arena:
            raise ValueError("shrink_memory_arena: expected memory_arena (enable_mem_arena) with it, got it off")
        largest = self.max_batch_size
        too_large = [size for size in self.preferred_batch_sizes if largest is not None and size > largest]
        if too_large:
            raise ValueError(f"preferred_batch_sizes: {too_large[0]} is more than max_batch_size, {largest}")
        if any(size < 1 for size in self.preferred_batch_sizes):
            raise ValueError("preferred_batch_sizes: expected at least 1 row")
        return self

    @property
    def origin(self) -> OptionsOrigin:
        """Where these options were read."""
        return self._origin

    def read_from(self, origin: OptionsOrigin) -> Self:
        """Set where these options were read. Returns self."""
        self._origin = origin
        return self

    def where(self, option: str) -> str:
        """An option's name for errors: "config.pbtxt:7: input 'x'"; lines are known only for a config.pbtxt."""
        line, name = self._origin.lines.get(option), self._origin.names.get(option, option)
        return f"{self._origin.file}:{line}: {name}" if line else f"{self._origin.file}: {name}"

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """The options in `folder`/model.toml, or the defaults if there is none.

        Raises ConfigError naming the file, the option, the expected and the actual value.
        """
        path = folder / FILE_NAME
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return cls()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from None
        try:
            return cls(**tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: not TOML: {error}") from None
        except ValidationError as error:
            raise ConfigError(f"{path}: " + "; ".join(_problem(e) for e in error.errors())) from None


def _problem(error: object) -> str:
    e = dict(error)  # type: ignore[call-overload]
    name = ".".join(str(part) for part in e["loc"])
    if e["type"] == "value_error":
        text = str(e["msg"]).removeprefix("Value error, ")
        return f"{name}: {text}" if name else text
    if e["type"] == "extra_forbidden" and len(e["loc"]) == 1:
        known = ", ".join(ModelConfig.model_fields)
        return f"{name} is not an option; the options are {known}"
    return f"{name}: {e['msg']}, got {e['input']!r}"


def table() -> str:
    """The README's table of model options, as Markdown."""
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for name, field in ModelConfig.model_fields.items():
        factory = field.default_factory
        default = str(field.default).lower() if factory is None else "{}" if factory is dict else "[]"
        default = "unset" if default == "none" else default
        lines.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(lines)
