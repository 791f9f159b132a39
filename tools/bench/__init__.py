"""What the benchmark commands `tools/bench_*.py` are made of: rows, timing, contenders, data and projections."""
