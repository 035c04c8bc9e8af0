"""Reports of results: tables in the terminal, goals, the HTML page, the README's table."""
