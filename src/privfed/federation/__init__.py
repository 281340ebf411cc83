"""The federation: clients, server, rounds, checkpoints and engines."""
