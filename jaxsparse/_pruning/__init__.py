"""One-shot pruning of trained weights on calibration data."""
