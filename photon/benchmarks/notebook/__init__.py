"""Notebooks that a model writes and that run shut in: sandbox, kernel, document, an agent's tools."""
