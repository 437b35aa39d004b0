"""Compare methods: judges score their answers, and the report shows statistics, figures and samples."""
