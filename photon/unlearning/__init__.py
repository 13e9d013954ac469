"""LUNAR: prompts to be forgotten are steered to where the model says that it does not know (2502.07218)."""
