"""Adapter layers for other modules than a linear one, and layers whose own parts train."""
