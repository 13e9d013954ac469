"""Benchmarks of what trained models do, over endpoints that speak OpenAI's API; nothing else imports them."""
