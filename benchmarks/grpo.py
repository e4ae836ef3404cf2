"""GRPO iteration: 8 prompts of 32 tokens, 8 samples of 64 tokens each, KL to a reference in the loss.

python benchmarks/grpo.py [--models llama5m llama36m llama128k] [--repeats 3] [--threads 2]
"""

from duel import scenario

if __name__ == "__main__":
    scenario("grpo", __doc__ or "", "trl116", "1.16.0", {"other": 8, "llama128k": 1}, samples=8)
