"""The parts of the report; each answers one question with a `Section` if it applies."""
