"""The operations: `api.py` checks the arguments and selects one of the backends beside it."""
