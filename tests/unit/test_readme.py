"""The documents' tables are what the code says, all of them are there, and links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

_spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
assert _spec is not None and _spec.loader is not None
tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tables)


def test_every_table_is_there_and_fresh() -> None:
    for path, names in tables.DOCUMENTS.items():
        text = path.read_text("utf-8")
        assert tuple(m["name"] for m in tables.BLOCK.finditer(text)) == names, path
        assert tables.fresh(text) == text, f"{path.name}: run `make tables`"


def test_a_stale_table_is_noticed() -> None:
    stale = README.replace("`--grpc-port`", "`--grpc-prot`")
    assert stale != README
    assert tables.fresh(stale) == README


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text("utf-8"))
    assert not [link for link in links if "://" not in link and not (path.parent / link).exists()]
