"""Optional kernels.  Nothing is imported here: minipeft.ops finds each by its module's name."""
