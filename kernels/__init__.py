"""Triton kernels, one file per op, installed as ``fastadapter.kernels``; they import torch and triton alone."""
