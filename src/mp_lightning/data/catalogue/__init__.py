"""Datasets known by name: downloaded where that is needed, read, and kept resized where that is slow."""

from mp_lightning.data.catalogue.load import list_datasets, load_dataset, load_source, may_mirror

__all__ = ["list_datasets", "load_dataset", "load_source", "may_mirror"]
