"""Read what a model generated, score it against the gold turns and report."""
