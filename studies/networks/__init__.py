"""Networks that come with PyPI packages, as they were published."""
