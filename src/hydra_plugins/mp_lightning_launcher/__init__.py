"""Hydra's launcher ``processes``: every job of a sweep is a process group of its own."""
