"""What a run tells its owner: the receipt, its summary in words, and the HTML report."""
