"""SQS: Bayesian compression of neural networks on Pyro."""

from sqs_pyro import _torchvision as _torchvision  # before anything that may import torchvision
