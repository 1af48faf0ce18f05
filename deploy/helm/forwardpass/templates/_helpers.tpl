{{- /* Names, labels, and what is computed from other values. */ -}}
{{- define "forwardpass.name" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- define "forwardpass.selector" -}}
app.kubernetes.io/name: forwardpass
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "forwardpass.labels" -}}
{{ include "forwardpass.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- with .Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "forwardpass.image" -}}
{{- $tag := default (ternary (printf "%s-cuda" .Chart.AppVersion) .Chart.AppVersion .Values.gpu.enabled) .Values.image.tag -}}
{{- if .Values.image.digest }}{{ .Values.image.repository }}@{{ .Values.image.digest }}{{ else }}{{ .Values.image.repository }}:{{ $tag }}{{ end }}
{{- end }}

{{- /* A third of drainSeconds the server goes on accepting, the rest is for what is in flight. */ -}}
{{- define "forwardpass.drainWait" -}}{{ div (int .Values.drainSeconds) 3 }}{{- end }}
{{- define "forwardpass.grace" -}}{{ sub (int .Values.drainSeconds) (div (int .Values.drainSeconds) 3) }}{{- end }}

{{- /* Probes send no credentials: with TLS they go to a plaintext port that answers nothing but health. */ -}}
{{- define "forwardpass.probePort" -}}{{ ternary .Values.ports.health .Values.ports.grpc (ne .Values.tls.secretName "") }}{{- end }}
{{- define "forwardpass.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}
