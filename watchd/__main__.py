"""`python -m watchd`."""

from watchd.cli import main

main()
