"""The commands: a record and a body for each (`registry`), and the owner of a run (`job`)."""
