"""``python -m soteacher``: the command line."""

from soteacher.cli import main

if __name__ == "__main__":
    main()
