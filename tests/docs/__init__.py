"""The documents agree with the code, in generated and in written parts."""
