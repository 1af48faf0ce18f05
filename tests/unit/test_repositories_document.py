"""docs/repositories.md names every option of a config.pbtxt that is acted on, accepted, or refused for a reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from forwardpass.model import triton_options
from forwardpass.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "repositories.md").read_text(encoding="utf-8")
NAMED = {word for code in re.findall(r"`([^`\n]+)`", TEXT) for word in re.findall(r"[a-z_]+", code)}


@pytest.mark.parametrize(
    "path", sorted(triton_options.SUPPORTED | triton_options.NO_EFFECT.keys() | triton_options.BECAUSE.keys())
)
def test_every_option_is_named(path: str) -> None:
    """Each by its own name; what stands in a map or a list goes with that."""
    last = path.rsplit(".", 1)[-1]
    aside = {"num_versions", "versions", "string_value", "enable", "batch_size", "count", "inputs", "level", "shape"}
    assert last in NAMED or last in aside, f"{path} is not in docs/repositories.md"


def test_the_ways_of_control_are_the_settings() -> None:
    ways = Settings.model_fields["model_control"].annotation.__args__  # type: ignore[union-attr]
    assert all(f"| `{way}` |" in TEXT for way in ways)
    assert {"poll_seconds", "load_model", "model_name"} <= Settings.model_fields.keys()
    assert all(f"`--{option}`" in TEXT for option in ("poll-seconds", "load-model", "model-name", "model-control"))
