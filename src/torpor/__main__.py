"""`python -m torpor` is the `torpor` command."""

from torpor.cli.main import main

main()
