"""From a checkpoint to images: made (sampler), or mended (inpainter) and written as the files they were (photo_files).
Needs no data set.
"""

from attnorm.inference.inpainter import Filled, Inpainter, View
from attnorm.inference.sampler import Sampler, Samples

__all__ = ["Filled", "Inpainter", "Sampler", "Samples", "View"]
