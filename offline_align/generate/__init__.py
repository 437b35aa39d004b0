"""Generate answers of a policy to prompts: requests, engines, and a journal that makes runs resumable."""
