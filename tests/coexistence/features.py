"""All features of the matrix, in the order of its table."""

from __future__ import annotations

from coexistence import features_of_calls, features_of_weights
from coexistence.feature import Feature

__all__ = ["FEATURES"]

FEATURES = [Feature("nothing"), *features_of_weights.FEATURES, *features_of_calls.FEATURES]
