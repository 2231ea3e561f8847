{{- /* Probes and declared ports follow the addresses in the agent's configuration. Each has a port or none, and an IPv6
address with a port is in brackets. For the wildcard address healthzHost consists of nothing but 0, "." and ":". */ -}}
{{- define "ebpfproxy.healthz" -}}
{{ with .Values.config.kubeProxy }}{{ index . "healthzBindAddress" | default "" }}{{ end }}
{{- end }}

{{- define "ebpfproxy.healthzHost" -}}
{{ include "ebpfproxy.healthz" . | trimPrefix "[" | regexFind "^([0-9]+[.][0-9.]+|[0-9a-fA-F:.]+)" }}
{{- end }}

{{- define "ebpfproxy.healthzPort" -}}
{{ include "ebpfproxy.healthz" . | regexFind "(^[0-9.]+|]):[0-9]+$" | regexFind "[0-9]+$" | default "10256" }}
{{- end }}

{{- define "ebpfproxy.metrics" -}}
{{ with .Values.config.kubeProxy }}{{ index . "metricsBindAddress" | default "" }}{{ end }}
{{- end }}

{{- define "ebpfproxy.metricsPort" -}}
{{ include "ebpfproxy.metrics" . | regexFind "(^[0-9.]+|]):[0-9]+$" | regexFind "[0-9]+$" | default "10249" }}
{{- end }}
