"""Export a trained model: `python -m dantinox.export`; the program is `dantinox/cli/export.py`."""

if __name__ == "__main__":
    from dantinox.cli.export import program

    program()
