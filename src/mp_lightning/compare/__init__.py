"""Floor 4, does it help? Arms side by side on one target, with intervals."""
