"""Generation for the command line."""
