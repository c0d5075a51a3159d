"""Models and prompts of which the exact effect of edges can be had, for bench/bench_truth.py."""
