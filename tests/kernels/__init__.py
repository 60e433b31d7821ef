"""Triton is told to interpret its kernels, on a machine without CUDA, before any test imports them."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
