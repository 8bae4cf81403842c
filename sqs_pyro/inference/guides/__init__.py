"""Variational families of a network's weights: the spike-and-GMM guide and its parts."""
