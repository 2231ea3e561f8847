"""Tests of what is sent to an OpenTelemetry collector, decoded by the definitions of opentelemetry-proto."""
