"""From a posterior to the network that ships: hard, folded, rounded, packed, and compared with what was judged."""
