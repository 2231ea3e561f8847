"""The documents agree with the code: what is made from it, and what people have written."""
