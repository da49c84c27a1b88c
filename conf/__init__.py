"""Hydra configuration of mp_lightning: a folder per group, found as ``pkg://mp_lightning.conf``."""
