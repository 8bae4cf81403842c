"""The `sqs` command: the one place that joins everything.

Commands import what they need when they run, so that `sqs --help` and mistyped options answer at once.
Results go to stdout (tables, or one JSON document with ``--json``), everything else to stderr.
"""

import logging  # noqa: I001

# In the order in which `sqs --help` shows them: each module's commands join the application as it is imported.
from sqs_pyro.cli import compressing, files, reports, benchmarks, studies  # noqa: F401
from sqs_pyro.cli.application import app

__all__ = ["app", "main"]


#: They warn of parts of torchao that do not fit this torch, where transformers imports it: no command needs them.
_OF_OTHERS = ("torchao", "torch.utils._pytree")


def main() -> None:
    """Entry point of the `sqs` command."""
    for name in _OF_OTHERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    app()
