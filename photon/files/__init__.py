"""Helpers on files and memory: atomic writes, hashes, freed memory."""
