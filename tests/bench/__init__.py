"""What benchmarks work out of their measurements."""
