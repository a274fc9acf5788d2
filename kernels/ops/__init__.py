"""The operations: `api.py` checks the arguments and chooses, a file or folder for each backend does the work."""
