"""`python -m bench gpu`: the plan for nine minutes on a GPU, and its execution."""
