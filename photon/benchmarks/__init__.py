"""Benchmarks of what trained models do, over endpoints that speak OpenAI's API; training imports nothing of it."""
