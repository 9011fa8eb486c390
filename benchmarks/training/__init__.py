"""A small language model, and what each loss makes of it."""
