"""Bad input: fuzzing of all that others send (``make fuzz``), and a sample of it (``make test``)."""
