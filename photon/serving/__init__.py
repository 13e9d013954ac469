"""Exported models that answer: in a terminal, and to clients of OpenAI's API."""
