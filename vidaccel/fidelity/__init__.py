"""Is the patched clip still the same clip: metrics, and the ``validate`` command that applies them."""
