"""From adapter and base to one checkpoint: plan every tensor, stream it, compare the logits."""
