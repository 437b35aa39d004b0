"""Compare a judge with human verdicts: agreement, biases and calibration."""
