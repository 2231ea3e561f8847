"""What a cluster is given: manifests, chart, image, unit; each rendered, run, or taken at its word."""
