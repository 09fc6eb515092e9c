"""Mirrors minipeft/; a package, so that benchmarks and child processes can import from it."""
