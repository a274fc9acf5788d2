"""Check this machine and the installation: `python -m dantinox.doctor`; the program is `dantinox/cli/doctor.py`."""

if __name__ == "__main__":
    from dantinox.cli.doctor import program

    program()
