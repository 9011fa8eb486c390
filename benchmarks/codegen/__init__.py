"""What the compiled kernels need and cost, on GPUs that are not there."""
