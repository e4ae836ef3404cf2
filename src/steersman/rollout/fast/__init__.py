"""Everything of sampling that reaches into a model's modules: faster ways to compute the same."""
