"""The parts that benchmarks are made of: problems, the kernels that solve them, checks, timing and rows."""
