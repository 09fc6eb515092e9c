"""Kernels in Triton, for CUDA and ROCm devices."""
