"""Networks by name, photos, and the calibration images made from them."""
