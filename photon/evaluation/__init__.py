"""What a trained model is asked to show: perplexity, text, an export."""
