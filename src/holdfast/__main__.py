"""Entry point of `python -m holdfast`, which runs the command line `holdfast`."""

from holdfast.cli import main

if __name__ == "__main__":
    main()
