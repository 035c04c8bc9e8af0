"""Look-alikes of NVIDIA's and NeMo's Jasper, for the tests of fuse and convert.

They have the class names, attributes, state-dict keys and call forms of the originals, but were written from a
description. Golden results of NVIDIA's own system check its look-alike. A block is a dictionary with the keys of the
reference's configuration files.
"""
