"""Writes the generated tables of README.md and docs/ anew, from the code they describe: `make tables`.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. A test checks that none is stale.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from forwardpass import settings
from forwardpass.model import options
from forwardpass.observability import catalogue
from forwardpass.transport.rest import endpoints

ROOT = Path(__file__).resolve().parent.parent
# By document: the tables it must have, in their order.
DOCUMENTS = {
    ROOT / "README.md": ("settings", "model options", "metrics"),
    ROOT / "docs" / "http.md": ("paths",),
}
TABLES = {
    "settings": settings.table,
    "model options": options.table,
    "metrics": catalogue.table,
    "paths": endpoints.table,
}
BLOCK = re.compile(r"(<!-- table: (?P<name>[a-z ]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def fresh(text: str) -> str:
    """`text` with every table as the code has it now. Raises KeyError for a name that is no table's."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{TABLES[block['name']]()}\n\n{block[3]}", text)


def main() -> int:
    stale = {path: new for path in DOCUMENTS if (new := fresh(old := path.read_text("utf-8"))) != old}
    if "--check" in sys.argv[1:]:
        return int(bool(stale))
    for path, new in stale.items():
        path.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
