"""Which face of an op runs, whether its kernels passed the self-check, and why a face is missing."""
