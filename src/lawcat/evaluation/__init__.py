"""Running a model over samples, scoring its answers, perplexity, and reports."""
