"""Benchmarks: one question a file, each run in a process of its own, raw times in results/."""
