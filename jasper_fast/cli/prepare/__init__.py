"""`jasper-fast prepare`: data made ready for training and evaluation, one file a subcommand."""
