"""Which face of an op runs, whether it is to be trusted, and why one is missing."""
