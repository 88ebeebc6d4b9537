"""Images in, uint8 batches out. Rests on nothing else in the package."""

from attnorm.data.builtin import builtin_photographs
from attnorm.data.images import ImageSet, builtin_images, load_images, shuffled_indices, to_float, to_uint8

__all__ = [
    "ImageSet",
    "builtin_images",
    "builtin_photographs",
    "load_images",
    "shuffled_indices",
    "to_float",
    "to_uint8",
]
