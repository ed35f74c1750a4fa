"""A base for the catalogue: what is read of it, checked on it, and written for it."""
