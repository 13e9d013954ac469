"""Text to packed token windows: corpora, tokenizer, silos, manifest and loader."""
