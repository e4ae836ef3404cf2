"""vLLM's side of the rollout benchmark, run by the Python of an environment that has it.

python benchmarks/vllm_side.py rollout FOLDER THREADS DEVICE DTYPE PROMPTS SAMPLES
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from common import Turns, peak_mib

turns = Turns()
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

NEW = 128


def main() -> None:
    _, folder, threads, _, dtype, rows, samples = sys.argv[1:]
    import torch
    from vllm import LLM, SamplingParams

    torch.set_num_threads(int(threads))
    turns.imported = peak_mib()
    model = LLM(
        str(Path(folder) / "policy"), dtype=dtype, max_model_len=512, max_num_seqs=64, disable_log_stats=True, seed=0
    )
    texts = [json.loads(line)["prompt"] for line in (Path(folder) / "prompts.jsonl").read_text().split("\n") if line]
    ids = model.get_tokenizer()(texts[: int(rows)])["input_ids"]
    prompts = [{"prompt_token_ids": row} for row in ids]
    turns.ready()
    while True:
        turns.wait()
        params = SamplingParams(n=int(samples), temperature=1.0, max_tokens=NEW, ignore_eos=True, detokenize=False)
        out = model.generate(prompts, params, use_tqdm=False)
        turns.done(tokens=sum(len(o.token_ids) for request in out for o in request.outputs))


if __name__ == "__main__":
    main()
