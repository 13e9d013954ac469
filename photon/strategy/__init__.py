"""One file per strategy: who gets which state groups, and how replies are folded."""
