"""The GPT: from a model section to megatron-core's GPTModel, with a vocabulary head or a reward head."""
