"""How good images are: features of a network, and pure functions of features or of pixels."""
