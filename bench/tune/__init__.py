"""`python -m bench tune`: measures tiles and faces on this GPU, for the tables by which dispatch chooses."""
