"""The configuration: dataclass sections, one root dataclass per command, composed by Hydra."""
