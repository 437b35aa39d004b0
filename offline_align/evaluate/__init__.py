"""Comparison of methods: answers side by side, judges, statistics, figures and the report."""
