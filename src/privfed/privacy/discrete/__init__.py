"""Integer noise in shares: samplers, rounding, sensitivity, accounting, and their composition in one mechanism."""
