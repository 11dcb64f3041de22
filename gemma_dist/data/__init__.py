"""From raw rows to the tensors of a micro-batch: parse, shard, order, encode, collate."""
