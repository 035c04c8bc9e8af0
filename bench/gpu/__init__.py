"""`python -m bench gpu`: the plan of nine minutes on a GPU, and what carries it out."""
