"""One script per claim about speed: python -m benchmarks.<name>, or all of them: make bench."""
