"""Sweeps: `search_space` parses the file, `distributions` draws values, `report` writes the results."""
