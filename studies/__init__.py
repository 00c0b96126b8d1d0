"""Measurements of whether traces explain better, with controls; ``python -m studies`` runs them, see README.md."""
