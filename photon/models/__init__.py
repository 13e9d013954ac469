"""Model presets and builders over transformers."""
