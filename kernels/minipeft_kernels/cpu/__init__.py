"""Loops for CPUs, compiled by numba."""
