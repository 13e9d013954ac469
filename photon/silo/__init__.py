"""A silo at its own site: its folders and settings, and what it does with a message."""
