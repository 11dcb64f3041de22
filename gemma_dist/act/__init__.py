"""Own runs: the model's calls are executed by functions of the user's, and what comes of it is kept as rows."""
