"""The proof that every launch trains the same model: `python -m tests.parity`, or `make parity`."""
