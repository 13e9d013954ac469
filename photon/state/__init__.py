"""Checkpoints and silo state: everything that lets a run go on after a crash."""
