"""Freed memory goes back to the system now and then while a network is loaded."""

from sqs_pyro.kernels import heap


def test_the_heap_is_trimmed_whenever_much_was_freed(monkeypatch):
    trimmed = []
    monkeypatch.setattr(heap, "_malloc_trim", lambda: trimmed.append)
    kept = heap.Heap()
    for _ in range(10):
        kept.freed(1 << 20)
    assert trimmed == [0, 0]  # behind 4 and 8 of 10 MB


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(heap, "_malloc_trim", lambda: None)
    heap.Heap().freed(1 << 30)
