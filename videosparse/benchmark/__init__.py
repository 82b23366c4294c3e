"""The parts that `eval/bench_attention.py` is made of: problems, the kernels that solve them, checks and timing."""
