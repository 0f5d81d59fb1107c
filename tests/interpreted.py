"""Lets Triton's interpreter run its kernels where there is no GPU to compile them for.

Triton asks when it is imported, so this is imported before anything of the model.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
