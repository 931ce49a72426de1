"""How fast, how big, how soon, and still the same: the ``bench`` command and what it is made of."""
