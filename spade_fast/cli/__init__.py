"""The command line, ``spade-fast``."""
