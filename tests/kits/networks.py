"""The catalogue: networks of every kind that people compress, small, by name."""

from kits.networks_built import BUILT
from kits.networks_torchvision import TIMM, TORCHVISION
from kits.networks_transformers import TRANSFORMERS

NETWORKS = {**BUILT, **TORCHVISION, **TIMM, **TRANSFORMERS}
