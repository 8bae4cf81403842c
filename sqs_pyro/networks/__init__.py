"""Plain networks, nothing random: how one is called and rebuilt, its parts, and those known by name."""
