"""The model: megatron-core's GPTModel, built from a model section, with a vocabulary or a reward head."""
