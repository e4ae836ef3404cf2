"""Everything that reaches into transformers' modules: faster ways to compute the same."""
