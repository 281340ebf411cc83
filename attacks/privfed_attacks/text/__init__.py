"""What attacks on texts share: the inputs of the layers, the spans of their gradients, the prior."""
