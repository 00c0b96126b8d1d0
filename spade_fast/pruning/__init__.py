"""From a network and calibration data to the pruned weights of a sample."""
