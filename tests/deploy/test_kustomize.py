"""The Kustomize base is what the chart makes of its defaults; the overlays build, are valid, and keep the policy."""

from __future__ import annotations

import importlib.util

import pytest
from tests.deploy import toolbox
from tests.deploy.conftest import Figure
from tests.deploy.policy import broken

KUSTOMIZE = toolbox.DEPLOY / "kustomize"

_spec = importlib.util.spec_from_file_location("kustomize_generate", KUSTOMIZE / "generate.py")
assert _spec is not None and _spec.loader is not None
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


def _build(folder: str) -> toolbox.Manifests:
    (kubectl,) = toolbox.need("kubectl")
    done = toolbox.run(kubectl, "kustomize", KUSTOMIZE / folder)
    assert done.returncode == 0, done.stderr
    return toolbox.validate(done.stdout, toolbox.versions())


def test_the_base_is_fresh() -> None:
    (helm,) = toolbox.need("helm")
    assert generate.BASE.read_text(encoding="utf-8") == generate.fresh(str(helm)), "run deploy/kustomize/generate.py"


@pytest.mark.parametrize("folder", ["base", "overlays/cpu", "overlays/gpu"])
def test_what_is_built_is_valid_and_keeps_the_policy(folder: str, figure: Figure) -> None:
    built = _build(folder)
    assert not built.problems, "\n".join(built.problems)
    assert not broken(built.objects)
    assert {item["metadata"]["namespace"] for item in built.objects} == {"forwardpass"}
    figure(f"kustomize, {folder}", f"{len(built.objects)} objects valid")


def test_only_the_gpu_overlay_asks_for_a_gpu() -> None:
    for folder, image, gpus in (("cpu", "forwardpass:0.1.0", None), ("gpu", "forwardpass:0.1.0-cuda", 1)):
        pod = _build(f"overlays/{folder}").one("Deployment")["spec"]["template"]["spec"]
        server = pod["containers"][0]
        assert (server["image"], server["resources"]["limits"].get("nvidia.com/gpu")) == (image, gpus)
        env = {e["name"]: e["value"] for e in server["env"]}
        assert env.get("FORWARDPASS_PROVIDER") == ("cuda" if gpus else None)
        assert env["FORWARDPASS_REPOSITORY"] == "/models"  # the patch added to the list and replaced nothing
        assert bool(pod.get("tolerations")) == bool(gpus)
