"""Odd states of a process in which a public call may find itself: none of them may show in what it does."""

import contextlib
import random

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine


@contextlib.contextmanager
def float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def other_random_states():
    torch.manual_seed(99), random.seed(99), np.random.seed(99)  # noqa: NPY002
    yield


@contextlib.contextmanager
def parameters_and_a_plate():
    """Within a model, as it is run: handlers, plates and a store that has the names that we use."""
    pyro.param("0.weight", torch.ones(3))
    pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
    with poutine.trace(), poutine.condition(data={"0.weight": torch.zeros(6, 4)}), pyro.plate("data", 3):
        yield


@contextlib.contextmanager
def no_validation():
    with pyro.settings.context(validate_distributions_pyro=False, validate_poutine=False, validate_infer=False):
        yield


AMBIENT = {
    "as usual": contextlib.nullcontext,
    "float64": float64,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta device": lambda: torch.device("meta"),
    "random states": other_random_states,
    "Pyro": parameters_and_a_plate,
    "no validation": no_validation,
}
