"""Compare methods: judge their answers and report statistics, figures and samples."""
