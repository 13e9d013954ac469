"""Real silos: keys, a federation of processes on one machine, and the check of a silo before it joins."""
