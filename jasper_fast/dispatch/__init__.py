"""Decides which face (implementation) of an op runs. The choice depends on what this machine can run, what passed the
self-check, and what was measured to be fastest."""
