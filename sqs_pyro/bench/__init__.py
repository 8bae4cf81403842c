"""How fast packed products and networks are on this machine, beside what else there is."""
