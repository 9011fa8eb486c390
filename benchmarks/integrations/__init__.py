"""The integrations: a census of models, a training step, fine-tuning of a real model."""
