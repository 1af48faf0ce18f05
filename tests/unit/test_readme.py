"""The README's tables are what the code says, all of them are there, and its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

_spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
assert _spec is not None and _spec.loader is not None
tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tables)


def test_every_table_is_there_and_fresh() -> None:
    assert [m["name"] for m in tables.BLOCK.finditer(README)] == list(tables.TABLES)
    assert tables.fresh(README) == README, "run `make tables`"


def test_a_stale_table_is_noticed() -> None:
    stale = README.replace("`--grpc-port`", "`--grpc-prot`")
    assert stale != README
    assert tables.fresh(stale) == README


def test_links_lead_somewhere() -> None:
    broken = [
        link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", README) if "://" not in link and not (ROOT / link).exists()
    ]
    assert not broken
