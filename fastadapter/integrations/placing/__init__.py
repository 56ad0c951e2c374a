"""What each method puts where in a model."""
