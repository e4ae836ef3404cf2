"""DPO steps: batches of 16 pairs, mixed lengths; a turn is one epoch over the same rows.

python benchmarks/dpo.py [--models llama5m llama36m llama128k] [--repeats 3] [--threads 2]
"""

from duel import scenario

if __name__ == "__main__":
    scenario("dpo", __doc__ or "", "trl116", "1.16.0", {"other": 4, "llama36m": 1, "llama128k": 1})
