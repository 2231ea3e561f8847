"""What developers run: the lock of all Python packages, and a try of newer ones."""
