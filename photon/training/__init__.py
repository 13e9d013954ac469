"""Local training: the loop, the schedule, precision, batch probe and groups of devices."""
