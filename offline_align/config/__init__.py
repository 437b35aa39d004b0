"""What a user can set: dataclass sections, one root per command, and their composition by Hydra."""
