"""Train a model: `python -m dantinox.train`; the program is `dantinox/cli/train.py`."""

if __name__ == "__main__":
    from dantinox.cli.train import program

    program()
