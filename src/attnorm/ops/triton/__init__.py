"""Attentive Normalization (Eq. 2-6) on a GPU by Triton kernels. Imported on demand: nothing else needs triton.

`plans` cuts a pass over the feature map up, `launch` runs the `kernels`, `check` says where they cannot be used.
"""

from attnorm.ops.triton.check import unsupported_reason
from attnorm.ops.triton.launch import backward, double_backward, forward

__all__ = ["backward", "double_backward", "forward", "unsupported_reason"]
