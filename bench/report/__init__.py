"""Results as files, a table in the terminal, plots and one HTML page."""
