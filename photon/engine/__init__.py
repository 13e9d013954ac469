"""Where a federation runs: in this process, on Flower's simulation engine, on a SuperLink."""
