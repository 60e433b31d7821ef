"""What a model is worth: avg@k, pass@k, and the calibration of its critic."""
