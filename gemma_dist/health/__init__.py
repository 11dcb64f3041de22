"""`gemma-dist health`: whether the nodes of a job are fit for it, before it begins."""
