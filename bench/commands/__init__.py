"""The subcommands that measure, one file each."""
