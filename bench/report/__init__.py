"""Reports results: tables in the terminal, goals, the HTML page, and the README's table."""
