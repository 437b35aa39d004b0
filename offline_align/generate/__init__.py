"""Answers of a policy to prompts: requests, engines, the journal that makes it resumable."""
