"""What developers run: demo, benchmarks, the generator of documents, the lock of all Python packages."""
