"""Triton is told to interpret its kernels, on a machine without CUDA, before any test or library imports it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
