"""The contract: one raw row becomes one checked trajectory, then token ids and labels."""
