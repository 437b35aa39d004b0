"""Thin mains, one a command: prepare, build the parts by name, run one body, write the manifest."""
