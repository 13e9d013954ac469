"""Federations that take part in a larger one as a silo does."""
