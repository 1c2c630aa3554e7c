"""`python -m jobs` is `ditflow`."""

from jobs.cli import main

main()
