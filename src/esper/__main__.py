"""`python -m esper` is `esper-cli`."""

from esper.cli import main

main()
