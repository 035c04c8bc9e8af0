"""`python -m bench tune`: tiles and faces measured on this GPU, for the tables that dispatch chooses by."""
