"""A run's files as a page and as pictures: what a command wrote is read here, never a model."""
