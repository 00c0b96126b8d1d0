"""What the studies share: photos, cases, the networks compared, scores, records and tables."""
