"""Every kernel against fp64, in a process of its own."""
