"""Integer noise in shares: samplers, rounding, sensitivity, accounting, and their composition in one mechanism."""

LAWS = ("discrete_gaussian", "skellam")
"""The names of the laws: mechanisms of privacy events that only Renyi accounting knows."""
