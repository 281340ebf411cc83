"""Privacy: per-example gradients, clipping, noise, accounting, plans, and the data holder's ledger."""
