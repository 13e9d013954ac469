"""What is trained: one file an objective."""
