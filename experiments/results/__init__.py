"""Numbers of runs and of result files, and what differs between them."""
