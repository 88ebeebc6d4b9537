"""One thread for all tests: their maps are too small for two, and results that are compared to the last bit must be
summed in one order, in subprocesses too. Without a GPU, Triton's interpreter runs the kernels.
"""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are first imported
