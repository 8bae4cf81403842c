"""Damaged files of every kind that is read: each is refused in one sentence, or read right; see ``__main__``."""
