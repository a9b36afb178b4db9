"""`python -m lawcat`: the command line."""

from lawcat.cli.app import main

main()
