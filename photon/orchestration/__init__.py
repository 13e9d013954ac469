"""Several models answer together, and a learnt policy decides who reads whom (2605.15573)."""
