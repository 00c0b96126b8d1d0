"""Runs CUDA kernels on the CPU with checks, for machines without a GPU: see include/cuda_runtime.h."""
