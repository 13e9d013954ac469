"""One stream of events and its listeners: display, file, report, Weights & Biases."""
