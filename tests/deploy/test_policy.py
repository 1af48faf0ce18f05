"""The policy itself: each rule finds its own fault, and finds none in what the chart renders; so do the schemas."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from tests.deploy import toolbox
from tests.deploy.policy import RULES, broken
from tests.deploy.test_chart import DOWNLOAD, OUT


def _pod(objects: list[Any]) -> Any:
    return _of(objects, "Deployment")["spec"]["template"]["spec"]


def _of(objects: list[Any], kind: str) -> Any:
    return next(o for o in objects if o["kind"] == kind)


def _set_env(objects: list[Any], name: str, value: str) -> None:
    _pod(objects)["containers"][0]["env"].append({"name": name, "value": value})


# Rule -> ways to break it, each a change of what the "spoiled" case renders.
FAULTS: dict[str, list[Any]] = {
    "not_root": [
        lambda o: _pod(o)["securityContext"].pop("runAsUser"),
        lambda o: _pod(o)["securityContext"].update(runAsNonRoot=False),
    ],
    "restricted": [
        lambda o: _pod(o)["containers"][0]["securityContext"].pop("allowPrivilegeEscalation"),
        lambda o: _pod(o)["initContainers"][0]["securityContext"].update(readOnlyRootFilesystem=False),
        lambda o: _pod(o)["containers"][0]["securityContext"]["capabilities"].update(add=["NET_RAW"]),
        lambda o: _pod(o)["containers"][0]["securityContext"].update(privileged=True),
    ],
    "seccomp": [lambda o: _pod(o)["securityContext"]["seccompProfile"].update(type="Unconfined")],
    "no_token": [lambda o: _pod(o).pop("automountServiceAccountToken")],
    "nothing_of_the_host": [
        lambda o: _pod(o).update(hostNetwork=True),
        lambda o: _pod(o)["volumes"].append({"name": "h", "hostPath": {"path": "/"}}),
    ],
    "writes_only_where_it_may": [
        lambda o: next(m for m in _pod(o)["containers"][0]["volumeMounts"] if m["name"] == "models").pop("readOnly")
    ],
    "bounded": [
        lambda o: _pod(o)["containers"][0]["resources"]["limits"].pop("memory"),
        lambda o: _pod(o)["containers"][0]["resources"].pop("requests"),
    ],
    "image_is_told_exactly": [
        lambda o: _pod(o)["containers"][0].update(image="registry:5000/forwardpass"),
        lambda o: _pod(o)["containers"][0].update(image="forwardpass:latest"),
    ],
    "probed": [
        lambda o: _pod(o)["containers"][0].pop("startupProbe"),
        lambda o: _pod(o)["containers"][0]["livenessProbe"]["grpc"].pop("service"),
        lambda o: _pod(o)["containers"][0]["readinessProbe"]["grpc"].update(port=1),
    ],
    "grace_covers_the_drain": [lambda o: _pod(o).update(terminationGracePeriodSeconds=30)],
    "rolled_one_by_one": [lambda o: _of(o, "Deployment")["spec"].pop("strategy")],
    "selectors_meet": [
        lambda o: _of(o, "Service")["spec"]["selector"].update(app="other"),
        lambda o: _of(o, "Service")["spec"]["ports"][0].update(targetPort="other"),
        lambda o: _of(o, "PodDisruptionBudget")["spec"]["selector"].update(matchLabels={}),
        lambda o: _of(o, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"].update(app="other"),
        lambda o: _of(o, "NetworkPolicy")["spec"]["ingress"][0]["ports"][-1].update(port="other"),
        lambda o: _of(o, "PodMonitor")["spec"]["selector"]["matchLabels"].update(app="other"),
    ],
    "scaled_by_requests": [
        lambda o: _of(o, "HorizontalPodAutoscaler")["spec"].update(
            metrics=[{"type": "Resource", "resource": {"name": "cpu"}}]
        ),
        lambda o: _of(o, "HorizontalPodAutoscaler")["spec"]["behavior"]["scaleDown"].update(
            stabilizationWindowSeconds=0
        ),
        lambda o: _of(o, "Deployment")["spec"].update(replicas=2),
    ],
    "closed_by_default": [
        lambda o: _of(o, "NetworkPolicy")["spec"].update(policyTypes=["Ingress"]),
        lambda o: _of(o, "NetworkPolicy")["spec"]["ingress"][0].pop("from"),
        lambda o: _of(o, "NetworkPolicy")["spec"]["egress"][0].pop("ports"),
    ],
    "no_secret_in_sight": [lambda o: _set_env(o, "FORWARDPASS_TOKEN", "hunter2")],
}


@pytest.fixture(scope="module")
def whole() -> toolbox.Manifests:
    """Everything that a rule speaks of, in one rendering."""
    return toolbox.render(
        {
            "models": DOWNLOAD,
            "networkPolicy": {"extraEgress": OUT},
            "autoscaling": {"kind": "hpa"},
            "monitor": {"kind": "pod"},
        }
    )


def test_every_rule_has_its_fault() -> None:
    assert [rule.__name__ for rule in RULES] == list(FAULTS)


@pytest.mark.parametrize(
    ("rule", "number"), [(rule, number) for rule, faults in FAULTS.items() for number in range(len(faults))]
)
def test_a_rule_finds_its_fault(rule: str, number: int, whole: toolbox.Manifests) -> None:
    objects = copy.deepcopy(whole.objects)
    assert not broken(objects)
    FAULTS[rule][number](objects)
    assert {text.partition(":")[0] for text in broken(objects)} == {rule}


@pytest.mark.parametrize("kind", ["Deployment", "PodMonitor"])
def test_the_schemas_know_an_unknown_field(kind: str, whole: toolbox.Manifests) -> None:
    objects = copy.deepcopy(whole.objects)
    _of(objects, kind)["spec"]["selektor"] = {}
    text = "\n---\n".join(json.dumps(item) for item in objects)
    assert [p for p in toolbox.validate(text, [toolbox.versions()[-1]]).problems if "selektor" in p]
