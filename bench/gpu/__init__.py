"""`python -m bench gpu`: a plan for nine minutes on a GPU, and the code that carries it out."""
