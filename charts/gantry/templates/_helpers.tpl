{{- define "gantry.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "gantry.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "gantry.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "gantry.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "gantry.selector" -}}
app.kubernetes.io/name: {{ include "gantry.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "gantry.labels" -}}
{{ include "gantry.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "gantry.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- .Values.serviceAccount.name | default (include "gantry.fullname" .) }}
{{- else }}
{{- .Values.serviceAccount.name | default "default" }}
{{- end }}
{{- end }}

{{- define "gantry.tokenSecret" -}}
{{- .Values.bootstrap.token.existingSecret | default (printf "%s-bootstrap" (include "gantry.fullname" .)) }}
{{- end }}

{{/* What the file says, without what values lay over it. */}}
{{- define "gantry.kubeletConfiguration" -}}
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: /var/run/secrets/kubernetes.io/serviceaccount/ca.crt}
authorization: {mode: Webhook}
rotateCertificates: true
failCgroupV1: false
clusterDomain: {{ .Values.cluster.domain }}
{{- with .Values.cluster.dns }}
clusterDNS: {{ toJson . }}
{{- end }}
registerWithTaints: {{ toJson .Values.node.taints }}
{{- end }}
