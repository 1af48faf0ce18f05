"""The Helm chart: a matrix of values, rendered for every Kubernetes version, against schemas and policy; refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.deploy import toolbox
from tests.deploy.conftest import Figure
from tests.deploy.policy import broken

from forwardpass.observability import catalogue
from forwardpass.settings import PREFIX, Settings

Values = dict[str, Any]
SHA = "ab" * 32
CLIENTS = [{"podSelector": {"matchLabels": {"role": "caller"}}}]
OUT = [{"to": [{"ipBlock": {"cidr": "192.0.2.0/24"}}], "ports": [{"protocol": "TCP", "port": 443}]}]
DOWNLOAD = {"source": "download", "download": {"url": "https://models.example/a.tar.gz", "sha256": SHA}}

MATRIX: dict[str, Values] = {
    "defaults": {},
    "one replica, nothing beside it": {
        "replicas": 1,
        "podDisruptionBudget": {"enabled": False},
        "topologySpread": {"enabled": False},
        "networkPolicy": {"enabled": False},
    },
    "claim": {"models": {"source": "pvc", "pvc": {"claimName": "models", "subPath": "prod"}}},
    "download": {"models": DOWNLOAD, "networkPolicy": {"extraEgress": OUT}},
    "image volume": {"models": {"source": "imageVolume", "imageVolume": {"reference": "models/a@sha256:" + SHA}}},
    "one model": {"models": {"source": "pvc", "pvc": {"claimName": "m"}, "single": "ranker", "path": "/mnt/models"}},
    "tls": {"tls": {"secretName": "forwardpass-tls"}},
    "mtls": {"tls": {"secretName": "forwardpass-tls", "clientCA": "ca.crt"}, "ports": {"health": 9003}},
    "tokens": {"tokens": {"secretName": "callers"}},
    "gpu": {"gpu": {"enabled": True, "count": 1, "runtimeClassName": "nvidia"}},
    "mig": {"gpu": {"enabled": True, "resource": "nvidia.com/mig-1g.10gb"}, "tolerations": [{"operator": "Exists"}]},
    "hpa": {"autoscaling": {"kind": "hpa", "maxReplicas": 40, "requestsPerPod": 64}},
    "keda": {"autoscaling": {"kind": "keda", "prometheus": "http://prometheus.monitoring:9090"}},
    "several processes": {"processes": {"count": 4, "scratch": "4Gi"}},
    "processes as many as cores": {"processes": {"count": "auto"}},
    "observed by pod": {
        "monitor": {"kind": "pod", "labels": {"release": "prometheus"}},
        "rules": {"enabled": True, "latencySeconds": 0.02},
        "dashboard": {"enabled": True},
    },
    "observed by service": {"monitor": {"kind": "service", "interval": "30s"}},
    "settings": {
        "settings": {"MAX_BATCH_SIZE": 128, "LOG_LEVEL": "debug", "RUN_TIMEOUT": 2.5},
        "extraEnv": [{"name": "TZ", "value": "UTC"}],
        "podAnnotations": {"a/b": "c"},
        "podLabels": {"team": "x"},
        "labels": {"owner": "y"},
    },
    "placed": {
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "a", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "high",
        "topologySpread": {"whenUnsatisfiable": "DoNotSchedule"},
        "image": {"digest": "sha256:" + SHA, "pullSecrets": [{"name": "pull"}]},
        "service": {"annotations": {"a": "b"}},
        "networkPolicy": {"clients": CLIENTS, "prometheus": []},
    },
    "slow to leave": {"drainSeconds": 600, "startupSeconds": 3600, "podDisruptionBudget": {"maxUnavailable": "25%"}},
}
NEEDS = {"image volume": (1, 31)}  # the oldest Kubernetes that has it

REFUSED: dict[str, tuple[Values, str]] = {
    "a value that there is not": ({"replicaCount": 2}, "replicaCount"),
    "a wrong type": ({"replicas": "two"}, "replicas"),
    "a bad digest": ({"image": {"digest": "sha256:12"}}, "digest"),
    "root": ({"securityContext": {"uid": 0}}, "uid"),
    "no memory limit": ({"resources": {"limits": {"memory": None}}}, "memory"),
    "no time to drain": ({"drainSeconds": 0}, "drainSeconds"),
    "a privileged port": ({"ports": {"grpc": 80}}, "grpc"),
    "no such source": ({"models": {"source": "s3"}}, "source"),
    "no such autoscaler": ({"autoscaling": {"kind": "vpa"}}, "kind"),
    "no pods at all": ({"autoscaling": {"minReplicas": 0}}, "minReplicas"),
    "an unlikely sha256": ({"models": {"download": {"sha256": "beef"}}}, "sha256"),
    "a setting in small letters": ({"settings": {"max_batch_size": 1}}, "max_batch_size"),
    "no claim": ({"models": {"source": "pvc"}}, "needs models.pvc.claimName"),
    "no reference": ({"models": {"source": "imageVolume"}}, "needs models.imageVolume.reference"),
    "no digest to hold against": (
        {"models": {"source": "download", "download": {"url": "https://x/y"}}},
        "needs models.download.url and models.download.sha256",
    ),
    "a download behind a closed transport": ({"models": DOWNLOAD}, "needs a rule in networkPolicy.extraEgress"),
    "keda without Prometheus": ({"autoscaling": {"kind": "keda"}}, "needs autoscaling.prometheus"),
    "more than the most": ({"autoscaling": {"minReplicas": 5, "maxReplicas": 4}}, "minReplicas 5 is more than"),
    "clients' authority without TLS": ({"tls": {"clientCA": "ca.crt"}}, "tls.clientCA needs tls.secretName"),
    "one port twice": ({"ports": {"grpc": 8002}}, "must differ"),
    "HTTP on the port of metrics": ({"ports": {"http": 8002}}, "must differ"),
    "a setting of the chart's": ({"settings": {"GRPC_PORT": 1}}, "settings.GRPC_PORT comes from"),
}


@pytest.mark.parametrize("case", MATRIX)
def test_every_version_takes_what_is_rendered(case: str, figure: Figure) -> None:
    versions = [v for v in toolbox.versions() if tuple(map(int, v.split("."))) >= NEEDS.get(case, (0,))]
    # Rendered for the oldest and the newest; what comes out is the same, and is held against every version's schemas.
    done, newest = (toolbox.template(MATRIX[case], version) for version in (versions[0], versions[-1]))
    assert done.returncode == 0, done.stderr
    assert newest.stdout == done.stdout
    rendered = toolbox.validate(done.stdout, versions)
    assert not rendered.problems, "\n".join(rendered.problems)
    assert not broken(rendered.objects)
    figure(f"chart, {case}", f"{len(rendered.objects)} objects valid for {versions[0]} to {versions[-1]}")


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_by_name(case: str) -> None:
    values, reason = REFUSED[case]
    done = toolbox.template(values)
    assert done.returncode != 0, f"rendered:\n{done.stdout[:400]}"
    assert reason in done.stderr


def test_an_image_volume_is_refused_where_there_is_none() -> None:
    done = toolbox.template(MATRIX["image volume"], "1.30")
    assert done.returncode != 0 and "needs Kubernetes 1.31 or newer" in done.stderr
    # and rightly so: that version's schema does not know it
    newer = toolbox.template(MATRIX["image volume"], "1.31").stdout
    assert any("'image' was unexpected" in p for p in toolbox.validate(newer, ["1.30"]).problems)


def test_an_older_cluster_is_refused() -> None:
    done = toolbox.template({}, "1.28")
    assert done.returncode != 0 and "1.29" in done.stderr


def test_lint_finds_nothing() -> None:
    (helm,) = toolbox.need("helm")
    done = toolbox.run(helm, "lint", "--strict", toolbox.CHART)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", MATRIX)
def test_every_variable_is_a_setting_of_the_server(case: str) -> None:
    """Read by the server's own code: names and values."""
    pod = toolbox.render(MATRIX[case]).one("Deployment")["spec"]["template"]["spec"]
    given = {e["name"]: e["value"] for e in pod["containers"][0]["env"] if e["name"].startswith(PREFIX)}
    fields = {name.removeprefix(PREFIX).lower(): value for name, value in given.items()}
    assert Settings(**fields).drain_wait > 0


def test_several_processes_have_room_for_the_weights_that_they_share() -> None:
    for case, count, size in (
        ("defaults", None, "64Mi"),
        ("several processes", "4", "4Gi"),
        ("processes as many as cores", "auto", "2Gi"),
    ):
        pod = toolbox.render(MATRIX[case]).one("Deployment")["spec"]["template"]["spec"]
        env = {e["name"]: e.get("value") for e in pod["containers"][0]["env"]}
        assert env.get("FORWARDPASS_PROCESSES") == count
        (tmp,) = [volume for volume in pod["volumes"] if volume["name"] == "tmp"]
        assert tmp["emptyDir"]["sizeLimit"] == size


def test_one_value_makes_every_time_of_the_drain() -> None:
    for seconds in (3, 10, 30, 100, 3600):
        pod = toolbox.render({"drainSeconds": seconds}).one("Deployment")["spec"]["template"]["spec"]
        env = {e["name"]: e["value"] for e in pod["containers"][0]["env"]}
        wait, grace = int(env["FORWARDPASS_DRAIN_WAIT"]), int(env["FORWARDPASS_GRACE"])
        assert wait == seconds // 3 and wait + grace == seconds
        assert pod["terminationGracePeriodSeconds"] == seconds + 10


def test_gpus_are_asked_for_and_tolerated() -> None:
    pod = toolbox.render(MATRIX["gpu"]).one("Deployment")["spec"]["template"]["spec"]
    server = pod["containers"][0]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert server["resources"]["limits"]["memory"]  # beside what was there
    assert server["image"].endswith("-cuda")
    assert {"name": "FORWARDPASS_PROVIDER", "value": "cuda"} in server["env"]
    assert [t["key"] for t in pod["tolerations"]] == ["nvidia.com/gpu"]
    assert "nvidia.com/gpu" not in toolbox.render({}).one("Deployment")["spec"]["template"]["spec"].get(
        "tolerations", ""
    )


def test_rules_and_dashboard_speak_of_metrics_that_there_are() -> None:
    rendered = toolbox.render(MATRIX["observed by pod"])
    texts = [json.dumps(rendered.one("PrometheusRule")), rendered.file("forwardpass.json")]
    for text in texts:
        found = set(toolbox.METRIC.findall(text))
        assert found
        for name in found:
            base = name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum")
            assert f"`{base}`" in catalogue.table(), name
    json.loads(texts[1])


FULL = """
rule_files: [rules.json]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'forwardpass_requests_total{namespace="serving",model="m",code="OK"}', values: '0+970x30'}
      - {series: 'forwardpass_requests_total{namespace="serving",model="m",code="UNAVAILABLE"}', values: '0+30x30'}
      - {series: 'forwardpass_refused_total{namespace="serving",model="m",reason="queue_rows"}', values: '0+30x30'}
      - {series: 'forwardpass_refused_total{namespace="serving",model="m",reason="invalid"}', values: '0+900x30'}
      - {series: 'forwardpass_ready{namespace="serving",pod="a"}', values: '0x30'}
      - {series: 'forwardpass_ready{namespace="serving",pod="b"}', values: '1x30'}
      - series: 'forwardpass_model_state{namespace="serving",pod="a",model="m",version="1",state="ready"}'
        values: '1x30'
      - series: 'forwardpass_model_state{namespace="serving",pod="a",model="bad",version="1",state="failed"}'
        values: '1x30'
      - series: 'forwardpass_model_state{namespace="serving",pod="b",model="bad",version="1",state="failed"}'
        values: '1x30'
      - series: 'forwardpass_model_state{namespace="serving",pod="b",model="off",version="",state="not_loaded"}'
        values: '1x30'
    alert_rule_test:
      - {eval_time: 4m, alertname: ForwardpassRefusing, exp_alerts: []}
      - eval_time: 20m
        alertname: ForwardpassRefusing
        exp_alerts:
          - exp_labels: {severity: critical, model: m, reason: queue_rows}
            exp_annotations:
              summary: More than 1 % of the requests are refused for want of capacity.
              description: 'Model m, reason queue_rows: scale out, or see docs/troubleshooting.md.'
      - eval_time: 20m
        alertname: ForwardpassNotReady
        exp_alerts:
          - exp_labels: {severity: warning, namespace: serving, pod: a}
            exp_annotations:
              summary: A server has not been ready for 5 minutes.
              description: 'a: its log says which model could not be loaded, and why.'
      - {eval_time: 4m, alertname: ForwardpassModelFailed, exp_alerts: []}
      - eval_time: 20m
        alertname: ForwardpassModelFailed
        exp_alerts:
          - exp_labels: {severity: warning, namespace: serving, model: bad, state: failed}
            exp_annotations:
              summary: A model that should serve does not, or not as it is on disk.
              description: 'Model bad, failed, pods and versions: 2. `forwardpass models` and the log have the reason.'
      - {eval_time: 20m, alertname: ForwardpassSlow, exp_alerts: []}
      - {eval_time: 20m, alertname: ForwardpassRunsFail, exp_alerts: []}
      - {eval_time: 20m, alertname: ForwardpassAbsent, exp_alerts: []}
      - {eval_time: 20m, alertname: ForwardpassSaturated, exp_alerts: []}
      - {eval_time: 20m, alertname: ForwardpassRestarts, exp_alerts: []}
"""
# Half an hour in which one model spends its error budget fast, and all that an operator must hear of happens.
BAD = """
rule_files: [rules.json]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'forwardpass_requests_total{namespace="serving",model="m",code="OK"}', values: '0+970x60'}
      - series: 'forwardpass_requests_total{namespace="serving",model="m",code="DEADLINE_EXCEEDED"}'
        values: '0+30x60'
      - {series: 'forwardpass_requests_total{namespace="serving",model="n",code="OK"}', values: '0+970x60'}
      - {series: 'forwardpass_requests_total{namespace="serving",model="n",code="INVALID_ARGUMENT"}', values: '0+30x60'}
      - {series: 'forwardpass_in_flight_requests{namespace="serving",pod="a"}', values: '90x60'}
      - {series: 'forwardpass_in_flight_requests_max{namespace="serving",pod="a"}', values: '100x60'}
      - series: 'forwardpass_file_reloads_total{namespace="serving",files="tokens",result="failed"}'
        values: '0x10 1x50'
      - {series: 'forwardpass_model_load_failures_total{namespace="serving",model="m"}', values: '0x10 1x50'}
      - {series: 'forwardpass_process_ends_total{namespace="serving",pod="a",cause="SIGKILL"}', values: '0x10 1x50'}
      - {series: 'forwardpass_certificate_expiry_seconds{namespace="serving",pod="a"}', values: '864000x60'}
      - {series: 'forwardpass_certificate_expiry_seconds{namespace="serving",pod="b"}', values: '8640000x60'}
      - {series: 'process_start_time_seconds{namespace="serving",pod="a"}', values: '1x5 2x5 3x5 4x40'}
      - {series: 'process_start_time_seconds{namespace="serving",pod="other"}', values: '1x5 2x5 3x5 4x40'}
      - {series: 'forwardpass_ready{namespace="serving",pod="a"}', values: '1x20 _x40'}
      - {series: 'forwardpass_refused_total{namespace="serving",model="m",reason="run_failed"}', values: '0x10 1x50'}
    alert_rule_test:
      - eval_time: 20m
        alertname: ForwardpassErrorBudgetFast
        exp_alerts:
          - exp_labels: {severity: critical, model: m}
            exp_annotations:
              summary: A month's error budget would be gone in two days.
              description: 'Model m: 3% of the requests of the last hour failed.'
      - eval_time: 30m
        alertname: ForwardpassErrorBudgetSlow
        exp_alerts:
          - exp_labels: {severity: warning, model: m}
            exp_annotations:
              summary: A month's error budget would be gone in five days.
              description: 'Model m: 3% of the requests of the last six hours failed.'
      - eval_time: 5m
        alertname: ForwardpassSaturated
        exp_alerts:
          - exp_labels: {severity: warning, namespace: serving, pod: a}
            exp_annotations:
              summary: A server has more than 80 % of the requests in flight that it takes.
              description: 'a: scale out before it refuses, or raise MAX_REQUESTS if memory allows.'
      - {eval_time: 9m, alertname: ForwardpassReloadFails, exp_alerts: []}
      - eval_time: 12m
        alertname: ForwardpassReloadFails
        exp_alerts:
          - exp_labels: {severity: warning, namespace: serving, files: tokens}
            exp_annotations:
              summary: Changed certificates or tokens cannot be used; the last good ones stay.
              description: 'tokens: the log says why.'
      - {eval_time: 40m, alertname: ForwardpassReloadFails, exp_alerts: []}
      - {eval_time: 9m, alertname: ForwardpassProcessEnds, exp_alerts: []}
      - eval_time: 12m
        alertname: ForwardpassProcessEnds
        exp_alerts:
          - exp_labels: {severity: warning, namespace: serving, pod: a, cause: SIGKILL}
            exp_annotations:
              summary: A process of a server died and was replaced.
              description: 'a, SIGKILL: calls that were under way on it failed. SIGKILL mostly means the memory limit.'
      - {eval_time: 40m, alertname: ForwardpassProcessEnds, exp_alerts: []}
      - eval_time: 12m
        alertname: ForwardpassLoadsFail
        exp_alerts:
          - exp_labels: {severity: warning, namespace: serving, model: m}
            exp_annotations:
              summary: A model could not be loaded.
              description: 'Model m: `forwardpass models` and the log have the reason.'
      - eval_time: 12m
        alertname: ForwardpassCertificateExpires
        exp_alerts:
          - exp_labels: {severity: critical, namespace: serving, pod: a}
            exp_annotations:
              summary: The TLS certificate in use expires within 14 days.
              description: 'a: in 9d 23h 48m 0s. A new one is taken up when its files change.'
      - {eval_time: 14m, alertname: ForwardpassRestarts, exp_alerts: []}
      - eval_time: 20m
        alertname: ForwardpassRestarts
        exp_alerts:
          - exp_labels: {severity: warning, namespace: serving, pod: a}
            exp_annotations:
              summary: A server was restarted more than twice within an hour.
              description: 'a: the end of its previous log (`kubectl logs --previous`) has the reason.'
      - {eval_time: 25m, alertname: ForwardpassAbsent, exp_alerts: []}
      - eval_time: 40m
        alertname: ForwardpassAbsent
        exp_alerts:
          - exp_labels: {severity: critical, namespace: serving}
            exp_annotations:
              summary: Prometheus finds no server.
              description: None runs, or none can be scraped.
      - eval_time: 16m
        alertname: ForwardpassRunsFail
        exp_alerts: []
"""


def test_prometheus_raises_the_alerts_when_it_should(tmp_path: Path, figure: Figure) -> None:
    """By Prometheus' own rule tests: what is refused for want of capacity, and not what callers did wrong."""
    (promtool,) = toolbox.need("promtool")
    spec = toolbox.render(MATRIX["observed by pod"]).one("PrometheusRule")["spec"]
    (tmp_path / "rules.json").write_text(json.dumps(spec))
    (tmp_path / "test.yaml").write_text(FULL)
    done = toolbox.run(promtool, "test", "rules", tmp_path / "test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "bad.yaml").write_text(BAD)
    done = toolbox.run(promtool, "test", "rules", tmp_path / "bad.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    tested = set(re.findall(r"alertname: (\w+)", FULL + BAD))
    assert tested == {rule["alert"] for group in spec["groups"] for rule in group["rules"]}
    (tmp_path / "test.yaml").write_text(FULL.replace("pod=\"b\"}', values: '1x30'", "pod=\"b\"}', values: '0x30'"))
    assert toolbox.run(promtool, "test", "rules", tmp_path / "test.yaml").returncode != 0
    figure("alert rules", f"{sum(len(g['rules']) for g in spec['groups'])} rules pass Prometheus' rule tests")
