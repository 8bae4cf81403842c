"""Seconds of one product, weights cold: on CPUs by the clock, on GPUs by events around a CUDA graph."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
Timer = Callable[[int], float]


def product_timer(copies: list[Product], x: Tensor) -> Timer:
    """Return a function from the number of a turn to the seconds that a product took in it.

    Args:
        copies: the same product with copies of one weight, together more than the caches hold.
        x: what it is computed of; its device says how it is timed.
    """
    return _by_events(copies, x) if x.is_cuda else _by_clock(copies, x)


def _by_clock(copies: list[Product], x: Tensor) -> Timer:
    """Time another copy each turn."""

    def turn(number: int) -> float:
        product = copies[number % len(copies)]
        start = time.perf_counter()
        product(x)
        return time.perf_counter() - start

    return turn


def _by_events(copies: list[Product], x: Tensor) -> Timer:
    """Time all copies each turn, one after another in one graph: no time of Python or of launches is in it."""
    # As torch asks for before a capture: warm up on a side stream, with both streams waiting for each other.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and allocates what libraries keep
        for product in copies[:2] * 2:
            product(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in copies:
            product(x)

    def turn(number: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / len(copies)  # milliseconds to seconds, a product

    return turn
