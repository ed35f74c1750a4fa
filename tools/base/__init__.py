"""Adds a base to the catalogue: reads its architecture, checks it, and writes its files."""
