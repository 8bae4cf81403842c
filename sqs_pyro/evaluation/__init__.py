"""How good a network is on data, and whether network, data and likelihood fit each other."""
