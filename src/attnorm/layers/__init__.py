"""Attentive Normalization, the self-attention that it is measured against, conditional norm, residual blocks."""
