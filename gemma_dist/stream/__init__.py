"""Which sample comes when, with which others, on which rank: arithmetic; then the tensors of a micro-batch."""
