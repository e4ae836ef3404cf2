"""Learning per sample beside TRL's PPO and GRPO: the same model, reward and hyper-parameters, several seeds.

    python benchmarks/learning.py --data ../shared/data --out runs/learning [--seeds 0 1 2] [--only page]

Steps: `task` writes the start model's copy, prompts, the reward model and the critic's start; `same` gives both
sides the same responses for a few iterations, in float64, and compares the weights that they arrive at; `runs`
trains; `look` lets one evaluator answer the same held-out prompts with every kept policy; `page` writes
docs/results/performance/learning.json and the picture. A part that is there is not made again. About 45 minutes on
one core. The environments of the peers are those of README.md here; a missing one is named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch
from duel import HERE, PEERS, RESULTS, about
from learning_page import SIDES, draw, summarise
from learning_task import METHODS, NEW, REWARD, SHARED, reward_function, write_rows
from safetensors.torch import load_file

from steersman.data import DataConfig, encode_prompts, layout, prompts
from steersman.model import load_policy, load_scalar
from steersman.ops.masked import masked_sum
from steersman.rollout import Engine, Sampling
from steersman.train.experience import behaviour_logp, tokens_of
from steersman.types import Prompt, Sample, Tokens
from steersman.verbs.reward_model import RewardModelRecipe
from steersman.verbs.reward_model import run as train_reward

PYTHONS = {"ppo": PEERS / "trl112" / "bin" / "python", "grpo": PEERS / "trl116" / "bin" / "python"}
TRAIN, HELD = 1024, 256
GIVEN = 5
"""Iterations of the comparison with given responses."""


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    if not (args.data / "stories260k" / "hf").is_dir():
        sys.exit(f"{args.data / 'stories260k' / 'hf'}: not there; give --data the folder that holds stories260k")
    task = args.out / "task"
    methods = [m for m in args.methods if known(m)]
    if "task" in args.only and not (task / "prompts.jsonl").exists():
        write_task(task, args.data)
    if "same" in args.only:
        for method in methods:
            same(method, args.out, task)
    cells = [(m, side, seed) for seed in args.seeds for m in methods for side in SIDES]
    if "runs" in args.only:
        for method, side, seed in cells:
            train(method, side, args.out / f"{method}-{side}-{seed}", task, seed, args.iterations, args.every)
    if "look" in args.only:
        watcher = Watcher(task)
        for method, side, seed in cells:
            watcher.look(method, args.out / f"{method}-{side}-{seed}")
    if "page" in args.only:
        settings = {"shared": SHARED, "methods": METHODS, "new_tokens": NEW, "iterations": args.iterations}
        facts = {**about(args, versions(args.out)), "seeds": args.seeds, "held_out": HELD, "settings": settings}
        found = facts | summarise(args.out, methods, args.seeds)
        args.docs.mkdir(parents=True, exist_ok=True)
        (args.docs / "learning.json").write_text(json.dumps(found, indent=1) + "\n")
        draw(found, args.docs.parent / "learning-vs-trl.png")
        print(args.docs / "learning.json")


def arguments() -> argparse.Namespace:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    given.add_argument("--out", type=Path, default=HERE.parent / "runs" / "learning", help="where runs are kept")
    given.add_argument("--docs", type=Path, default=RESULTS)
    given.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    given.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given.add_argument("--iterations", type=int, default=25, help="of 64 responses each")
    given.add_argument("--every", type=int, default=5, help="iterations between looks at the held-out prompts")
    steps = ["task", "same", "runs", "look", "page"]
    given.add_argument("--only", nargs="+", choices=steps, default=steps)
    args = given.parse_args()
    args.out, args.data = args.out.resolve(), args.data.resolve()
    args.device, args.dtype, args.threads = "cpu", "float32", 1
    return args


def known(method: str) -> bool:
    if not PYTHONS[method].exists():
        print(f"{method}: no environment {PYTHONS[method].parents[1]}, left out (see benchmarks/README.md)")
    return PYTHONS[method].exists()


def versions(out: Path) -> dict[str, str]:
    logs = [json.loads(path.read_text()) for path in out.glob("*-trl-*/log.json")]
    return {"trl": " and ".join(sorted({log["trl"] for log in logs}))}


def write_task(task: Path, data: Path) -> None:
    """Start model and tokenizer, prompts, rewards.py, the critic's start and the reward model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    task.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(data / "stories260k" / "hf")
    tokenizer.pad_token = tokenizer.eos_token  # which this model never says
    model = AutoModelForCausalLM.from_pretrained(data / "stories260k" / "hf", pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(task / "start")
    torch.manual_seed(0)
    critic = AutoModelForSequenceClassification.from_pretrained(task / "start", num_labels=1)
    critic.save_pretrained(task / "critic")
    for folder in ("start", "critic"):
        tokenizer.save_pretrained(task / folder)
    (task / "rewards.py").write_text(REWARD)
    text = "\n".join(path.read_text() for path in sorted((data / "tinystories").glob("*.txt")))
    openings = [" ".join(words[:8]) for story in text.split("<|endoftext|>") if len(words := story.split()) > 8]
    openings = list(dict.fromkeys(openings))[: TRAIN + HELD]
    write_rows(task / "held.jsonl", [{"prompt": opening} for opening in openings[TRAIN:]])
    write_given(task, openings)
    write_judge(task, openings[:TRAIN])
    write_rows(task / "prompts.jsonl", [{"prompt": opening} for opening in openings[:TRAIN]])


def answers(task: Path, openings: list[str], n: int, seed: int) -> list[Sample]:
    """`n` responses of the start model to each opening."""
    policy = load_policy(str(task / "start"))
    path = write_rows(task / "openings.jsonl", [{"prompt": opening} for opening in openings])
    config = DataConfig(path=str(path))
    given, _, _ = encode_prompts(prompts(config).train, layout(policy, config), config, None, NEW)
    samples = Engine(policy.model, policy.tokenizer, eos_token_id=[]).generate(given, Sampling(NEW), n=n, seed=seed)
    path.unlink()
    return samples


def write_judge(task: Path, openings: list[str]) -> None:
    """A reward model from the start model, of pairs of its own responses in which VADER prefers one."""
    groups: dict[int, list[Sample]] = defaultdict(list)
    for sample in answers(task, openings, 4, 1):
        groups[sample.prompt.index].append(sample)
    pairs = []
    for group in groups.values():
        scores = reward_function(task)([], [s.text for s in group])
        best, worst = max(range(4), key=scores.__getitem__), min(range(4), key=scores.__getitem__)
        if scores[best] - scores[worst] > 0.2:
            pairs.append({"prompt": group[0].prompt.text, "chosen": group[best].text, "rejected": group[worst].text})
    path = write_rows(task / "pairs.jsonl", pairs)
    recipe = {
        "model": {"path": str(task / "start")},
        "data": {"path": str(path), "held_out": 128, "append_eos": False},
        "train": {"batch_size": 32, "epochs": 4, "centre": 0.01},
        "optimizer": {"lr": 5e-4, "schedule": "cosine"},
        "run": {"dir": str(task / "judge-run"), "threads": 1, "device": "cpu"},
    }
    train_reward(RewardModelRecipe.model_validate(recipe))
    (task / "judge-run" / "model").rename(task / "judge")


def write_given(task: Path, openings: list[str]) -> None:
    """Responses by iteration and prompt: 64 prompts of one, and 8 prompts of 8 that have different lengths."""
    for method, count, n in (("ppo", 64, 1), ("grpo", 8, 8)):
        name = f"given-{method}"
        rounds: list[dict[str, list[list[int]]]] = []
        for turn in range(GIVEN):
            one: dict[str, list[list[int]]] = defaultdict(list)
            for sample in answers(task, openings[:count], n, 100 + turn):
                cut = NEW if method == "ppo" else NEW - 5 * sample.index
                one[json.dumps(sample.prompt.ids)].append(sample.ids[:cut])
            rounds.append(one)
        write_rows(task / f"{name}-prompts.jsonl", [{"prompt": opening} for opening in openings[:count]])
        (task / f"{name}.json").write_text(json.dumps(rounds))


def train(method: str, side: str, out: Path, task: Path, seed: int, iterations: int, every: int, *given: str) -> None:
    """One run in a process of its own, unless it is there already."""
    if (out / "log.json").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    python, script = (PYTHONS[method], "learning_trl.py") if side == "trl" else (sys.executable, "learning_ours.py")
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    words = [method, task, out, seed, iterations, every, *given]
    with (out / "out.txt").open("w") as log:
        code = subprocess.run(
            [str(python), str(HERE / script), *map(str, words)], stdout=log, stderr=log, env=environment, cwd=out
        ).returncode
    if code:
        sys.exit(f"{out}: ended with {code}:\n{(out / 'out.txt').read_text()[-3000:]}")
    print(f"{out.name}: {json.loads((out / 'log.json').read_text())['score'][-1]:.3f}", flush=True)


def same(method: str, out: Path, task: Path) -> None:
    """Both sides on the same responses: how far apart the weights are, by how far they moved."""
    path = out / f"same-{method}.json"
    if path.exists():
        return
    weights: dict[str, list[torch.Tensor]] = {}
    for side in SIDES:
        folder = out / f"same-{method}-{side}"
        train(method, side, folder, task, 0, GIVEN, 1, f"given-{method}.json")
        found = [load_file(folder / f"weights-{i:05}.safetensors") for i in range(GIVEN + 1)]
        names = sorted(found[0])
        weights[side] = [torch.cat([one[name].double().flatten() for name in names]) for one in found]
    ours, trl = weights["steersman"], weights["trl"]
    apart = [float((a - b).norm() / (a - ours[0]).norm()) for a, b in zip(ours[1:], trl[1:], strict=True)]
    path.write_text(json.dumps({"apart": apart, "moved": float((ours[-1] - ours[0]).norm())}))
    print(f"{method}: difference of the weights, as a share of their movement: {apart}", flush=True)


class Watcher:
    """One evaluator for both sides: the same held-out prompts and random streams, steersman's engine."""

    def __init__(self, task: Path) -> None:
        self.reference = load_policy(str(task / "start"), trainable=False)
        self.policy = load_policy(str(task / "start"), trainable=False)
        self.judge = load_scalar(str(task / "judge"))
        self.mood = reward_function(task)
        self.engine = Engine(self.policy.model, self.policy.tokenizer, eos_token_id=[])
        config = DataConfig(path=str(task / "held.jsonl"))
        self.prompts: list[Prompt]
        self.prompts, _, _ = encode_prompts(prompts(config).train, layout(self.policy, config), config, None, NEW)

    @torch.no_grad()
    def look(self, method: str, run: Path) -> None:
        """Writes score, VADER and KL (nats per response) of every kept policy of a run."""
        if (run / "looks.json").exists() or not (run / "log.json").exists():
            return
        rows = []
        for path in sorted(run.glob("weights-*.safetensors")):
            self.policy.model.load_state_dict(load_file(path), strict=False)
            samples = self.engine.generate(self.prompts, Sampling(NEW), seed=7)
            tokens: Tokens = tokens_of(samples)
            mood = self.mood([], [s.text for s in samples])
            vader = sum(mood) / len(mood)
            gap = behaviour_logp(samples, tokens.mask.shape[1]) - self.reference.logp(tokens).logp
            judged = float(self.judge.score(tokens).mean())
            rows.append(
                {
                    "iteration": int(path.stem.split("-")[1]),
                    "score": judged if method == "ppo" else vader,
                    "vader": vader,
                    "judge": judged,
                    "kl": float(masked_sum(gap, tokens.mask, dim=-1).mean()),
                }
            )
        (run / "looks.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
