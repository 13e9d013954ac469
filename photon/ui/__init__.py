"""A page on runs, served on this machine alone."""
