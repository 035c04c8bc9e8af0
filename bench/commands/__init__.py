"""Subcommands that measure, one file each, and the types of their options."""
