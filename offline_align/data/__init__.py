"""Rows, public data sets, templates, token caches, packing and the demo corpus."""
