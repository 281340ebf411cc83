"""Ways to divide the training rows over clients, one file each."""
