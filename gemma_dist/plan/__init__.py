"""What a run takes of a GPU's memory, before there is one."""
