"""BixBench (arXiv 2503.00096): questions on biological data that an agent answers in a notebook."""
