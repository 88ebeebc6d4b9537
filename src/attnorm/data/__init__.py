"""Images in, uint8 batches out. Rests on nothing else in the package, and its processes that decode not on torch."""
