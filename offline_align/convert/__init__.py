"""Conversion from and to Hugging Face format: tensor names, architecture, tokenizer, model card."""
