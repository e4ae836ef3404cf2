"""Rollout beside vLLM's CPU build: 64 prompts of 32 tokens with 128 new tokens, and 8 prompts x 8 samples.

    python benchmarks/vllm_rollout.py [--models llama5m llama36m] [--repeats 3] [--threads 2]

vLLM compiles the model at its first start, which takes minutes; it keeps the result for the next one. Prefix
caching is on (its default), so after the first turn its prompts cost it nothing.
"""

from duel import rollout

if __name__ == "__main__":
    rollout(__doc__ or "", "vllm", "0.32.0")
