"""What a user can look at before and beside a run: a row, a step, a resolved recipe."""
