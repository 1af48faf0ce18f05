{{- /* What values.schema.json cannot say: one value that needs, or excludes, another. Each text names what to set. */ -}}
{{- define "forwardpass.checks" -}}
{{- $v := .Values -}}
{{- if and (eq $v.models.source "pvc") (not $v.models.pvc.claimName) }}{{ fail "models.source=pvc needs models.pvc.claimName" }}{{ end }}
{{- if and (eq $v.models.source "imageVolume") (not $v.models.imageVolume.reference) }}{{ fail "models.source=imageVolume needs models.imageVolume.reference" }}{{ end }}
{{- if and (eq $v.models.source "imageVolume") (semverCompare "<1.31.0-0" .Capabilities.KubeVersion.Version) }}
{{- fail (printf "models.source=imageVolume needs Kubernetes 1.31 or newer, this is %s" .Capabilities.KubeVersion.Version) }}{{ end }}
{{- if eq $v.models.source "download" }}
{{- if not (and $v.models.download.url $v.models.download.sha256) }}{{ fail "models.source=download needs models.download.url and models.download.sha256" }}{{ end }}
{{- if and $v.networkPolicy.enabled (not $v.networkPolicy.extraEgress) }}{{ fail "models.source=download needs a rule in networkPolicy.extraEgress to where it downloads from (or networkPolicy.enabled=false)" }}{{ end }}
{{- end }}
{{- if and (eq $v.autoscaling.kind "keda") (not $v.autoscaling.prometheus) }}{{ fail "autoscaling.kind=keda needs autoscaling.prometheus" }}{{ end }}
{{- if gt (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas) }}{{ fail (printf "autoscaling.minReplicas %d is more than autoscaling.maxReplicas %d" (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas)) }}{{ end }}
{{- if and $v.tls.clientCA (not $v.tls.secretName) }}{{ fail "tls.clientCA needs tls.secretName" }}{{ end }}
{{- $ports := list (int $v.ports.grpc) (int $v.ports.http) (int $v.ports.metrics) (int $v.ports.health) }}
{{- if ne (len (uniq $ports)) 4 }}{{ fail (printf "ports.grpc, ports.http, ports.metrics and ports.health must differ, got %v" $ports) }}{{ end }}
{{- $taken := list "REPOSITORY" "MODEL_NAME" "STRICT" "HOST" "GRPC_PORT" "HTTP_PORT" "METRICS_PORT" "DRAIN_WAIT" "GRACE" "MAX_CONNECTION_AGE" "PROVIDER" "TLS_CERTIFICATE" "TOKENS" "TLS_KEY" "TLS_CLIENT_CA" "HEALTH_PORT" }}
{{- range $name, $_ := $v.settings }}{{ if has $name $taken }}{{ fail (printf "settings.%s comes from the chart's other values and cannot be set here" $name) }}{{ end }}{{ end }}
{{- end }}
