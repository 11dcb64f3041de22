"""From a checkpoint, of this package or of DeepSpeed's engine, to a folder that loads anywhere; an adapter for a
server's own LoRA; or the adapter between two models."""
