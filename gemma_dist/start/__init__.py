"""The first hour: `gemma-dist init` writes a run's files, `gemma-dist doctor` looks at the machine."""
