"""Rows of other layouts in the OpenAI shape: a module for each family, told by its keys. `convert.py` picks one."""
