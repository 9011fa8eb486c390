"""What losses over ranks send, what that costs by a model, and what they take where there are GPUs."""
