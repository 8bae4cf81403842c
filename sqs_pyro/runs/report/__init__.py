"""Pages of what is finished: what they are made of, and where they are kept."""
