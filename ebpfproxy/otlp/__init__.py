"""Logs and metrics for an OpenTelemetry collector, over OTLP/HTTP, where ``otlpEndpoint`` names one.

``libraries`` says if they are there, and imports none of them. All other modules import OpenTelemetry, the
extra ``otlp`` of the package, and are imported only once there is an endpoint. ``exporter`` is the agent's:
``log_sender`` sends its log, ``metric_sender`` what ``/metrics`` has, which ``convert`` translates.
``delivery`` knows what becomes of the requests.
"""
