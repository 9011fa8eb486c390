"""Time, memory and correctness of the losses, on the machine that is there."""
