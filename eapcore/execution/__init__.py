"""An experiment cut into batches that fit: ablations, memory, prefetching, CUDA graphs, resuming."""
