"""Chat with a model: `python -m dantinox.chat`; the program is `dantinox/cli/chat.py`."""

if __name__ == "__main__":
    from dantinox.cli.chat import program

    program()
