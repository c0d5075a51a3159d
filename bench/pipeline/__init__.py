"""The pipeline's benches: a model and its prompts with every implementation, on a GPU, and over their sizes."""
