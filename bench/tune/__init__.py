"""`python -m bench tune`: measures implementations and tiles on this GPU. Dispatch chooses from the resulting table."""
