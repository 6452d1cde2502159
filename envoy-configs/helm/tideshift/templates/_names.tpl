{{- define "tideshift.name" -}}
{{- default .Release.Name .Values.name | trunc 52 | trimSuffix "-" -}}
{{- end }}

{{- define "tideshift.labels" -}}
{{ include "tideshift.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "tideshift.selector" -}}
app.kubernetes.io/name: tideshift
app.kubernetes.io/instance: {{ include "tideshift.name" . }}
{{- end }}

{{- define "tideshift.serviceAccount" -}}
{{- default (include "tideshift.name" .) .Values.serviceAccount.name -}}
{{- end }}

{{- define "tideshift.tokens" -}}
{{- default (printf "%s-tokens" (include "tideshift.name" .)) .Values.tokens.existingSecret -}}
{{- end }}

{{- define "tideshift.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end }}

{{- define "tideshift.scheme" -}}
{{- if .Values.tls.secret }}https{{ else }}http{{ end -}}
{{- end }}

{{- /* What the controller needs in the namespaces whose TrafficShifts count. */}}
{{- define "tideshift.rules" -}}
- apiGroups: [tideshift.dev]
  resources: [trafficshifts]
  verbs: [list, watch]
# For the finalizer of those with `onDelete: Drain`, and nothing else of them.
- apiGroups: [tideshift.dev]
  resources: [trafficshifts]
  verbs: [get, patch]
- apiGroups: [tideshift.dev]
  resources: [trafficshifts/status]
  verbs: [patch]
# Which endpoints are ready, and of which pods they are.
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices]
  verbs: [list, watch]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
# Scaling, of what documents name as workloadRef.
{{- range .Values.workloads }}
- apiGroups: [{{ .apiGroup | quote }}]
  resources: [{{ join ", " .resources }}]
  verbs: [list, watch]
- apiGroups: [{{ .apiGroup | quote }}]
  resources: [{{ join "/scale, " .resources }}/scale]
  verbs: [patch]
{{- end }}
- apiGroups: [autoscaling]
  resources: [horizontalpodautoscalers]
  verbs: [list, watch, patch]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [list, watch]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
{{- end }}
