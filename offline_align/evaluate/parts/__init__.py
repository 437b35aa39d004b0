"""The parts of the report; each answers one question with a `Section`, or None if it does not apply."""
