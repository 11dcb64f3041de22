"""What tests and benchmarks share: ranks started as a user would, small corpora, a store, documents."""
