"""The server side: cohort, rounds, folding, outer step, and the grids that carry messages."""
