"""The parts that benchmarks are made of: of attention, of steps of whole models, and of profiles."""
