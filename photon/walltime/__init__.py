"""The papers' model of wall-clock time: compute, and what crosses the network."""
