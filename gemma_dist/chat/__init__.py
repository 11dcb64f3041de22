"""A conversation with a model in the terminal: its calls shown, checked and, if asked, executed."""
