"""Files of raw rows, a module for each format. Each can `split` an input into ranges, which depend on nothing but the
input, and `read` the rows of a range."""
