"""`python -m bench tune`: measures implementations and tiles on this GPU. Dispatch chooses by the resulting table."""
