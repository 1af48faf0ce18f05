"""Writes base/forwardpass.yaml: what the Helm chart makes of its defaults, without Helm's own labels.

`generate.py HELM`; the chart is the one source, and a test checks that the base is fresh.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BASE = HERE / "base" / "forwardpass.yaml"
HEAD = "# Made from the Helm chart by generate.py: change the chart, or patch this in an overlay.\n"
HELMS_OWN = ("app.kubernetes.io/managed-by:", "helm.sh/chart:", "# Source:")


def fresh(helm: str) -> str:
    """The base as the chart has it now. Raises CalledProcessError where helm cannot render it."""
    chart = HERE.parent / "helm" / "forwardpass"
    done = subprocess.run(
        [helm, "template", "forwardpass", chart, "--namespace", "forwardpass"],
        check=True,
        capture_output=True,
        text=True,
    )
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    return HEAD + "\n".join(line for line in lines if line and not line.strip().startswith(HELMS_OWN)) + "\n"


if __name__ == "__main__":
    BASE.write_text(fresh(sys.argv[1]), encoding="utf-8")
