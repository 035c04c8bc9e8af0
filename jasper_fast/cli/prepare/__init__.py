"""`jasper-fast prepare`: prepares data for training and evaluation. Each subcommand is a module in this folder."""
