"""Parts of a comparison's report, a question each: one `Section` where there is something to say, else None."""
