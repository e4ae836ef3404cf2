"""SFT steps: batches of 16, mixed lengths; a turn is one epoch over the same rows.

python benchmarks/sft.py [--models llama5m llama36m llama128k] [--repeats 3] [--threads 2]
"""

from duel import scenario

if __name__ == "__main__":
    scenario("sft", __doc__ or "", "trl116", "1.16.0", {"other": 4, "llama36m": 2, "llama128k": 1})
