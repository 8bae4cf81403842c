"""Tables, pictures and pages of a compressed network, drawn from plain data.

Nothing here trains or loads a network: numpy arrays and numbers come in, rich tables, PNG and HTML files go out.
matplotlib is imported only by :mod:`sqs_pyro.reporting.plots`.
"""

from sqs_pyro.reporting.layers import LayerPicture

__all__ = ["LayerPicture"]
