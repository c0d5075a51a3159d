"""A decoder as data, its forward and its hand-written backward, and the checkpoints that it comes from."""
