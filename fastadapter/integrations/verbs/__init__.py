"""What users do to a model, and the way back."""
