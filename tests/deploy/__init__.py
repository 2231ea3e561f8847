"""Manifests, chart, image and systemd unit are rendered, run and checked."""
