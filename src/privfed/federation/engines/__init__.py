"""Engines: the same rounds in one process, or over a network."""
