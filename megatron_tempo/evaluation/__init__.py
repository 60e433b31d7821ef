"""Evaluation of a model: avg@k, pass@k, and the calibration of its critic."""
