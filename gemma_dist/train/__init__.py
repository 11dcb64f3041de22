"""Training: one core for every launch config, from shards to an adapter or a model."""
