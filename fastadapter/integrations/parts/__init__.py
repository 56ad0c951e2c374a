"""What a transformers model is made of, found by its structure."""
