"""4-bit layers beyond the linear one: embeddings, experts, GPT-2's Conv1D."""
