"""What every manifest here keeps to, beyond what the schemas ask: one function a rule, each with its reason.

`broken(objects)` names each broken rule. Pure; objects are as parsed from YAML.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Object = dict[str, Any]
Rule = Callable[[list[Object]], Iterator[str]]
RULES: list[Rule] = []

GRACE = ("FORWARDPASS_DRAIN_WAIT", "FORWARDPASS_GRACE")
WORKLOADS = ("Deployment",)


def broken(objects: list[Object]) -> list[str]:
    """`rule: what is wrong`, for each rule that these objects do not keep."""
    return [f"{rule.__name__}: {text}" for rule in RULES for text in rule(objects)]


def _rule(rule: Rule) -> Rule:
    RULES.append(rule)
    return rule


def _pods(objects: list[Object]) -> Iterator[tuple[Object, Object]]:
    """Each workload with its pod's spec."""
    for item in objects:
        if item["kind"] in WORKLOADS:
            yield item, item["spec"]["template"]["spec"]


def _containers(objects: list[Object]) -> Iterator[Object]:
    for _, pod in _pods(objects):
        yield from pod.get("initContainers", [])
        yield from pod["containers"]


def _server(pod: Object) -> Object:
    found: Object = next(c for c in pod["containers"] if c["name"] == "server")
    return found


def _env(container: Object) -> dict[str, str]:
    return {e["name"]: str(e.get("value", "")) for e in container.get("env", [])}


@_rule
def not_root(objects: list[Object]) -> Iterator[str]:
    """A numeric uid: the kubelet cannot tell from a name that it is not root."""
    for _, pod in _pods(objects):
        context = pod.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
            yield f"runAsNonRoot {context.get('runAsNonRoot')}, runAsUser {context.get('runAsUser')}"


@_rule
def restricted(objects: list[Object]) -> Iterator[str]:
    """Pod Security Standards, level restricted, and a root file system that is not written to."""
    for container in _containers(objects):
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"{container['name']} may escalate"
        if context.get("readOnlyRootFilesystem") is not True:
            yield f"{container['name']} writes to its root"
        if context.get("capabilities", {}).get("drop") != ["ALL"] or context.get("capabilities", {}).get("add"):
            yield f"{container['name']} keeps capabilities"
        if context.get("privileged") or context.get("runAsUser") == 0:
            yield f"{container['name']} is privileged"


@_rule
def seccomp(objects: list[Object]) -> Iterator[str]:
    for _, pod in _pods(objects):
        if pod.get("securityContext", {}).get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield "no RuntimeDefault seccomp profile"


@_rule
def no_token(objects: list[Object]) -> Iterator[str]:
    """The server never speaks to the cluster's API."""
    for _, pod in _pods(objects):
        if pod.get("automountServiceAccountToken") is not False:
            yield "a service account's token is mounted"


@_rule
def nothing_of_the_host(objects: list[Object]) -> Iterator[str]:
    for _, pod in _pods(objects):
        shared = [key for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
        shared += [volume["name"] for volume in pod.get("volumes", []) if "hostPath" in volume]
        if shared:
            yield ", ".join(shared)


@_rule
def writes_only_where_it_may(objects: list[Object]) -> Iterator[str]:
    """Of volumes, only an emptyDir is mounted to be written; the models never into the server."""
    for _, pod in _pods(objects):
        empty = {volume["name"] for volume in pod.get("volumes", []) if "emptyDir" in volume}
        for mount in _server(pod).get("volumeMounts", []):
            if not mount.get("readOnly") and (mount["name"] not in empty or mount["name"] == "models"):
                yield mount["name"]


@_rule
def bounded(objects: list[Object]) -> Iterator[str]:
    """A memory limit, and requests for the scheduler to go by."""
    for container in _containers(objects):
        resources = container.get("resources", {})
        if "memory" not in resources.get("limits", {}) or not {"cpu", "memory"} <= resources.get("requests", {}).keys():
            yield f"{container['name']} has {resources}"


@_rule
def image_is_told_exactly(objects: list[Object]) -> Iterator[str]:
    for container in _containers(objects):
        image = container["image"]
        if "@sha256:" not in image and (":" not in image.rpartition("/")[2] or image.endswith(":latest")):
            yield image


@_rule
def probed(objects: list[Object]) -> Iterator[str]:
    """Readiness asks for the server, liveness for the process: a server that drains or is busy is not one to kill."""
    for _, pod in _pods(objects):
        server = _server(pod)
        ports = {port["containerPort"] for port in server["ports"]}
        for name, service in (("startupProbe", ""), ("readinessProbe", ""), ("livenessProbe", "grpc.health.v1.Health")):
            grpc = server.get(name, {}).get("grpc")
            if grpc is None or grpc.get("service", "") != service or grpc["port"] not in ports:
                yield f"{name} is {server.get(name)}"


@_rule
def grace_covers_the_drain(objects: list[Object]) -> Iterator[str]:
    """Otherwise the kubelet kills what the server is still answering."""
    for _, pod in _pods(objects):
        env = _env(_server(pod))
        takes = sum(float(env.get(name) or "inf") for name in GRACE)
        if not pod.get("terminationGracePeriodSeconds", 30) > takes:
            yield f"terminationGracePeriodSeconds {pod.get('terminationGracePeriodSeconds')} for {takes:g} s"


@_rule
def rolled_one_by_one(objects: list[Object]) -> Iterator[str]:
    """A new pod is ready before an old one goes."""
    for item, _ in _pods(objects):
        if item["spec"].get("strategy", {}).get("rollingUpdate", {}).get("maxUnavailable") != 0:
            yield f"strategy {item['spec'].get('strategy')}"


@_rule
def selectors_meet(objects: list[Object]) -> Iterator[str]:
    """Everything that selects pods selects these, by ports that they have."""
    for item, pod in _pods(objects):
        labels = item["spec"]["template"]["metadata"]["labels"].items()
        names = {port["name"] for port in _server(pod)["ports"]}
        if not item["spec"]["selector"]["matchLabels"].items() <= labels:
            yield "the Deployment selects others"
        for other in objects:
            spec = other.get("spec", {})
            if other["kind"] == "Service":
                selected = spec["selector"]
                lost = {port["targetPort"] for port in spec["ports"]} - names
                if lost:
                    yield f"Service {other['metadata']['name']} targets {sorted(lost)}"
            elif other["kind"] in ("PodDisruptionBudget", "PodMonitor"):
                selected = spec["selector"]["matchLabels"]
            elif other["kind"] == "NetworkPolicy":
                selected = spec["podSelector"]["matchLabels"]
                lost = {port["port"] for rule in spec["ingress"] for port in rule["ports"]} - names
                if lost:
                    yield f"NetworkPolicy {other['metadata']['name']} opens {sorted(lost)}"
            else:
                continue
            if not selected or not selected.items() <= labels:
                yield f"{other['kind']} {other['metadata']['name']} selects others"


@_rule
def scaled_by_requests(objects: list[Object]) -> Iterator[str]:
    """By what is queued and in flight; and the Deployment leaves the number to the autoscaler."""
    for scaler in objects:
        if scaler["kind"] not in ("HorizontalPodAutoscaler", "ScaledObject"):
            continue
        by = str(scaler["spec"].get("metrics") or scaler["spec"].get("triggers"))
        if "forwardpass_in_flight_requests" not in by or "'Resource'" in by:
            yield f"{scaler['kind']} scales by {by}"
        behavior = (
            scaler["spec"].get("behavior") or scaler["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        )
        if behavior["scaleDown"]["stabilizationWindowSeconds"] < 60:
            yield f"{scaler['kind']} scales down at once"
        for item, _ in _pods(objects):
            if item["metadata"]["name"] == scaler["spec"]["scaleTargetRef"]["name"] and "replicas" in item["spec"]:
                yield "the Deployment says replicas too"


@_rule
def closed_by_default(objects: list[Object]) -> Iterator[str]:
    """Where there is a NetworkPolicy, it opens no port to everybody and nothing outward but what is named."""
    for item in objects:
        if item["kind"] != "NetworkPolicy":
            continue
        spec = item["spec"]
        if set(spec.get("policyTypes", [])) != {"Ingress", "Egress"}:
            yield f"policyTypes {spec.get('policyTypes')}"
        for rule in spec.get("ingress", []):
            if not rule.get("from") or not rule.get("ports"):
                yield f"ingress {rule}"
        for rule in spec.get("egress", []):
            if not rule.get("to") or not rule.get("ports"):
                yield f"egress {rule}"


@_rule
def no_secret_in_sight(objects: list[Object]) -> Iterator[str]:
    for container in _containers(objects):
        for entry in container.get("env", []):
            secret = any(word in entry["name"].lower() for word in ("token", "password", "secret"))
            if secret and not str(entry.get("value", "/")).startswith("/"):  # a file's path is none
                yield f"{container['name']}: {entry['name']} is written out"
