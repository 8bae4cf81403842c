"""Export: from a packed file to what other programs read."""

from sqs_pyro.runs.export.call import export_file
from sqs_pyro.runs.export.formats import FORMATS

__all__ = ["FORMATS", "export_file"]
