"""Hugging Face form in and out: tensor names, architecture, tokenizer, model card."""
