"""Score a trained model on a text: `python -m dantinox.evaluate`; the program is `dantinox/cli/evaluate.py`."""

if __name__ == "__main__":
    from dantinox.cli.evaluate import program

    program()
