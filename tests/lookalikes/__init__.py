"""Modules with the class names, attributes, keys and call forms of NVIDIA's Jasper and of NeMo's, to test fuse.

Written from a description of both; NVIDIA's is held against the golden vectors. Blocks are dictionaries with the keys
of the reference's configuration files.
"""
