"""federation/engines."""
