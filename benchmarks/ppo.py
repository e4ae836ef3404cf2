"""PPO iteration: 64 prompts of 32 tokens, 64 new tokens, one epoch, a critic, a reward model and a reference.

python benchmarks/ppo.py [--models llama5m llama36m llama128k] [--repeats 3] [--threads 2]
"""

from duel import scenario

if __name__ == "__main__":
    scenario("ppo", __doc__ or "", "trl112", "1.12.0", {"other": 64, "llama128k": 8})
