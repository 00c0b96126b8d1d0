"""Explanations on traces: saliency methods, feature visualisation, and measures of their quality."""
