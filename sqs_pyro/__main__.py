"""`python -m sqs_pyro` is the `sqs` command."""

from sqs_pyro.cli import main

main()
