"""The command `jasper-fast`."""
