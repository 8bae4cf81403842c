"""The `sqs` command, also as `python -m sqs_pyro`."""

import sys

from sqs_pyro.errors import MissingPackageError
from sqs_pyro.extras import needed_for


def main() -> None:
    """Run the command, or say what it needs."""
    try:
        with needed_for("Commands"):
            from sqs_pyro.cli import main as run
    except MissingPackageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
