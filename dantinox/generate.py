"""Generate text from a trained model: `python -m dantinox.generate`; the program is `dantinox/cli/generate.py`."""

if __name__ == "__main__":
    from dantinox.cli.generate import program

    program()
