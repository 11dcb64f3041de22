"""Into whatever serves the result: what servers need of a model folder, and the commands that start them."""
