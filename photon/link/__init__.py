"""State groups to Flower records and back."""
