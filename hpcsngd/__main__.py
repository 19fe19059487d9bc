"""``python -m hpcsngd`` is the command line."""

from hpcsngd.cli import main

if __name__ == "__main__":
    main()
