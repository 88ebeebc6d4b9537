"""Losses, what a step of each task does, the training state, and one loop for all."""
