"""What leaves a participant of a federation, made private."""
