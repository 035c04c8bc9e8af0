"""`python -m bench tune`: measures tiles and faces on this GPU; dispatch chooses by the resulting table."""
