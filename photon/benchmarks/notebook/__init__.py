"""Notebooks that a model writes and that run shut in: sandbox, kernel, document, and the tools an agent has."""
