"""Who does a work on a GPU, and what no way can undercut; bench_gpu.py times them."""
