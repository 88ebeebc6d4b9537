"""Tasks and their losses, the training state, and one loop for all with what is due beside it."""
