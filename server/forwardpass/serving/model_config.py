"""One model's serving options: what `model.toml` may say.

Every option has a meaning, a unit and a default that works; what is not known here is refused by name, never ignored.
What depends on the server's own settings is left None here and decided when the model is loaded.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from forwardpass.errors import ConfigError

FILE_NAME = "model.toml"


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
    max_queue_rows: int = Field(8192, ge=1, description="Rows that may wait; a request that exceeds it is refused.")
    max_queue_requests: int = Field(4096, ge=1, description="Requests that may wait; one more is refused.")
    max_queue_bytes: int = Field(256 << 20, ge=1024, description="Bytes of requests that may wait.")
    max_request_rows: int = Field(
        65536,
        ge=1,
        description="Rows of the largest single request. Beyond max_batch_size it is run in slices, where rows are "
        "independent; otherwise it is refused.",
    )
    deadline_scheduling: bool = Field(
        True,
        description="Order the queue by deadline and refuse what cannot make its own. Off: first come, first served.",
    )
    default_timeout_us: int = Field(
        0, ge=0, description="Deadline in microseconds for requests that bring none; 0: none."
    )
    priority_levels: int = Field(
        1, ge=1, le=64, description="How many priorities requests may ask for; 1 is the highest."
    )
    default_priority: int = Field(1, ge=1, le=64, description="Priority of a request that asks for none.")
    instances: int | None = Field(
        None, ge=1, le=256, description="Runs of this model at the same time. Unset: the server's setting."
    )
    intra_op_threads: int | None = Field(
        None, ge=1, le=1024, description="Threads inside one run. Unset: the server chooses, and says why."
    )
    provider: str | None = Field(None, description="auto, cpu, cuda or cuda:N. Unset: the server's setting.")
    batch_invariance: bool | None = Field(
        None,
        description="Whether a row's answer is the same alone and in a batch. Unset: proved by a probe at load. true "
        "or false asserts it, and is printed as an assertion.",
    )
    labels: str | None = Field(None, description="A file beside this one with one class label a line.")

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """The options in `folder`/model.toml, or the defaults where there is none.

        Raises ConfigError naming the file, the option, what it may be and what came.
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
    if e["type"] == "extra_forbidden":
        known = ", ".join(ModelConfig.model_fields)
        return f"{name} is not an option; the options are {known}"
    return f"{name}: {e['msg']}, got {e['input']!r}"


def table() -> str:
    """The README's table of model options, as Markdown."""
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for name, field in ModelConfig.model_fields.items():
        default = "[]" if field.default_factory is not None else str(field.default).lower()
        default = "unset" if default == "none" else default
        lines.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(lines)
