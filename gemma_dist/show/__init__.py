"""What a user can look at before and beside a run: rows, a step, a resolved recipe, curves; and rows put aside."""
