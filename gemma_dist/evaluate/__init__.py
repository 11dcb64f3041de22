"""Let a model answer at decision points, read what it wrote, score it against the gold turns and report."""
