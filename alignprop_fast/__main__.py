"""`python -m alignprop_fast` is the command line."""

from alignprop_fast.cli.app import main

if __name__ == "__main__":
    main()
