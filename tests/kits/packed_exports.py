"""Packed networks of every kind that an export has to carry, with inputs."""

import math
from dataclasses import replace

import torch
from kits.exported import Residual, Words

from sqs_pyro.kernels import packed_network
from sqs_pyro.testing.layouts import random_coded

_RANDOM = torch.Generator().manual_seed(0)
INPUTS = {
    "residual": torch.randn(4, 3, 10, 10, generator=_RANDOM),
    "words": torch.randint(0, 41, (4, 6), generator=_RANDOM),
}
CODES = {  # options of the codes of every matrix and convolution
    "2 bits": {"components": 2},
    "4 bits": {"components": 9},
    "8 bits": {"components": 100, "exact_half": False},
    "no zeros": {"components": 16, "nonzero_rate": 1.0},
    "256 values and zeros": {"components": 256, "nonzero_rate": 0.9},
    "codebooks of channels": {"components": 5, "by_channel": True},
    "scales": {"components": 7, "scales": True},
    "whole numbers of 2 bits": {"components": 3, "whole": True},
    "whole numbers of 4 bits": {"components": 15, "whole": True},
    "whole numbers of 8 bits": {"components": 255, "whole": True},
    "scales of parts": {"components": 9, "part": 0},
    "whole numbers of 4 bits, scales of parts": {"components": 15, "whole": True, "part": 32},
}


def plain(kind):
    """A network with norms that are no identities."""
    net = {"residual": Residual, "words": Words}[kind]().eval()
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.dim() == 1 and value.is_floating_point():
                value.uniform_(0.5, 1.5)
    return net


def packed(kind, *codes):
    """The same, packed, its weights by each of the codes in turn; large enough for all of them to matter."""
    net = plain(kind)
    coded = {}
    for seed, (name, value) in enumerate(net.named_parameters()):
        if value.dim() > 1:
            options = dict(CODES[codes[len(coded) % len(codes)]])
            groups = value.shape[0] if options.pop("by_channel", False) else 1
            whole = options.pop("whole", False)
            if "part" in options:
                options["scales"] = parts(tuple(value.shape), options.pop("part"))
            coded[name] = random_coded(tuple(value.shape), groups=groups, seed=seed, **options)
            coded[name].codebook.mul_(16)
            coded[name] = on_whole_numbers(coded[name]) if whole else on_no_grid(coded[name])
    return packed_network(net, coded)


def parts(shape, size):
    """How many parts of an output's weights have scales of their own: two or more, of a size where that goes."""
    each = math.prod(shape[1:])
    if size and each % size == 0 and each > size:
        return each // size
    return next(count for count in range(2, each + 1) if each % count == 0)


def on_whole_numbers(coded):
    """The same codes of whole numbers about zero, times a scale of each output, or of each part that has one."""
    k = coded.num_components
    places = torch.tensor([float(n) for n in range(-((k + 1) // 2), k // 2 + 1) if n])
    of = coded.shape[:1] if coded.scales is None else coded.scales.shape
    scales = (torch.linspace(0.5, 2.0, math.prod(of)).view(of) / k).half().float()
    return replace(coded, codebook=places[None], scales=scales)


def on_no_grid(coded):
    """The same codes of values that are no whole numbers times one step."""
    values = coded.codebook
    bent = values + values * values.abs() / 8
    return replace(coded, codebook=bent.half().float() if coded.codebook_dtype == "float16" else bent)


def first_rows(inputs, count):
    """A minibatch of another size than the example's."""
    return inputs.repeat(3, *[1] * (inputs.dim() - 1))[:count]
