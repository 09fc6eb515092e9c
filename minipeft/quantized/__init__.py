"""4-bit layers beyond the linear one, and codebooks beyond NF4."""
