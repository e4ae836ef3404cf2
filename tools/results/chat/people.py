"""A real chat model toward what people preferred: PPO with its four models, online DPO, best-of-n, at equal KL.

    python tools/results/chat/people.py run --model MODEL --data ../shared/data --seeds 0 --peer PYTHON_WITH_TRL_1.12
    python tools/results/chat/people.py table --seeds 0

People's pairs (`hh_rlhf`) teach two reward models, each its own 400: the proxy is optimised, the gold
judge only looks. `run` makes what is missing and begins no further cell after `--minutes`; the same command goes on.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from overoptimisation_page import Array, Look, arena, at_kl, estimate, rows
from recording import finished, options, rewrite, run_cells, verb
from tasks import PEOPLE, QUIET

from steersman.atomic import write_atomic
from steersman.data import DataConfig, preferences
from steersman.flywheel import online_dpo
from steersman.flywheel.players import Player, load_queries
from steersman.jsonl import jsonl_text
from steersman.judge.scored import Scorer
from steersman.model import load_tokenizer
from steersman.recipe.sections import ModelConfig, RolloutConfig
from steersman.reward import RewardPart
from steersman.reward.rules import BUILTINS
from steersman.run.run_config import RunConfig
from steersman.verbs import generate, reward_model, rl
from steersman.verbs.on_policy_recipes import RECIPES

PAIRS, LOOKED = 400, 64
"""Pairs of each reward model, and how many held-out prompts are answered at a look."""
SAMPLING = {
    "max_new_tokens": PEOPLE["new_tokens"],
    "temperature": PEOPLE["temperature"],
    "held_out": LOOKED,
}
DRAWN, BEST_OF = 16, (1, 2, 4, 8, 16)
LEVELS = (0.5, 1.0, 1.5)
"""KL in nats per answer at which the judges are compared."""


def write_pairs(model: Path, data: Path, out: Path) -> None:
    """`proxy`, `gold` and `held_out`, pairs whose prompt has at most 128 tokens and whose answers at most 128.

    `asked` has the prompts of the first held-out pairs, which are answered at every look.
    """
    if (out / "asked.jsonl").exists():
        return
    tokenizer = load_tokenizer(str(model))
    found = preferences(DataConfig(path=str(data / "hh_rlhf"), on_bad_row="skip")).train
    kept = []
    for pair in found:
        prompt = tokenizer.apply_chat_template(pair.prompt, tokenize=True, return_dict=False)
        answers = [tokenizer(turns[-1]["content"])["input_ids"] for turns in (pair.chosen, pair.rejected)]
        if len(prompt) <= 128 and max(map(len, answers)) <= 128:
            kept.append({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected})
    random.Random(0).shuffle(kept)
    rest = kept[2 * PAIRS :]
    asked = [{"prompt": row["prompt"]} for row in rest[:LOOKED]]
    parts = {"proxy": kept[:PAIRS], "gold": kept[PAIRS : 2 * PAIRS], "held_out": rest, "asked": asked}
    out.mkdir(parents=True, exist_ok=True)
    for name, table in parts.items():
        write_atomic(out / f"{name}.jsonl", jsonl_text(table))


def judge(name: str, model: Path, out: Path) -> str:
    """The path of the reward model of a table of pairs."""
    values = {
        "model": {"path": str(model)},
        "data": {"path": str(out / f"{name}.jsonl"), "held_out_files": [str(out / "held_out.jsonl")]},
        "train": {"epochs": 1, "batch_size": 8}, "run": {"eval_every": 25},
        "optimizer": {"lr": 2e-5, "schedule": "linear", "warmup": 0.1},
    }  # fmt: skip
    return verb(reward_model, reward_model.RewardModelRecipe, out / f"{name}-judge", 0, values)["model"]


class Start:
    """What the ways share: the model, its prompts, both judges."""

    def __init__(self, model: Path, out: Path) -> None:
        self.model, self.out = str(model), out
        self.proxy, self.gold = judge("proxy", model, out), judge("gold", model, out)
        self.prompts = {"path": str(out / "proxy.jsonl"), "held_out_files": [str(out / "asked.jsonl")]}

    def ppo(self, folder: Path, seed: int) -> dict[str, Any]:
        values = {
            "model": {"path": self.model}, "data": self.prompts,
            "reward": {
                "parts": {"proxy": {"model": self.proxy}, "gold": {"model": self.gold, "weight": 0.0}},
                "normalise": True,
            },
            "rollout": {"prompts": PEOPLE["prompts"], "samples": PEOPLE["samples"], **SAMPLING},
            "algorithm": {"beta": PEOPLE["beta"], "epochs": 1, "minibatches": PEOPLE["minibatches"]},
            "optimizer": {"lr": PEOPLE["lr"], "warmup": PEOPLE["warmup"]}, "iterations": PEOPLE["iterations"],
            "critic": {"optimizer": {"lr": PEOPLE["lr"]}},
            "run": {"eval_every": PEOPLE["look_every"], "save_every": 1000},
        }  # fmt: skip
        return verb(rl, RECIPES["ppo"], folder, seed, values)

    def read_again(self, folder: Path) -> None:
        """PPO's held-out answers as the judges read those of the other ways: with an end token, also where they were
        cut. PPO itself is paid for what it wrote, without one."""
        scorer, asked = self.scorer(), rows(self.out / "asked.jsonl")
        looks = [row for row in rows(folder / "metrics.jsonl") if "held_out/kl" in row]
        said = rows(folder / "samples.jsonl")
        found = []
        for look in looks:
            some = sorted((row for row in said if row["step"] == look["step"]), key=lambda row: row["index"])
            answers = [row["completion"] for row in some]
            scores = scorer([asked[row["index"]]["prompt"] for row in some], answers)
            found.append({"kl": look["held_out/kl"], "answers": answers, **scores})
        write_atomic(folder / "looks.json", json.dumps(found))

    def ppo_trl(self, folder: Path, seed: int, peer: str) -> dict[str, Any]:
        """TRL's PPO with the same models, prompts and settings; looks at what it kept, as the other ways are read.

        It has no running norm of scores, so beta is made smaller by the scores' deviation before training.
        """
        folder.mkdir(parents=True, exist_ok=True)
        looks = [self.look(self.model, seed)]
        beta = PEOPLE["beta"] * float(np.std(looks[0]["proxy"]))
        script, prompts = Path(__file__).parent / "ppo_trl.py", self.out / "proxy.jsonl"
        command = [peer, script, self.model, self.proxy, prompts, seed, beta, folder]
        with (folder / "output.txt").open("a") as output:
            subprocess.run(
                [str(x) for x in command], stdout=output, stderr=output, env={**os.environ, **QUIET}, check=True
            )
        steps = range(PEOPLE["look_every"], PEOPLE["iterations"] + 1, PEOPLE["look_every"])
        looks += [self.look(str(folder / f"step-{n}"), seed) for n in steps]
        write_atomic(folder / "looks.json", json.dumps(looks))
        return done(folder)

    def look(self, path: str, seed: int) -> dict[str, Any]:
        """A model's answers to the held-out prompts, both judges' scores of each, KL to the start in nats."""
        data, run = DataConfig.model_validate(self.prompts), RunConfig(threads=1)
        rollout, device = RolloutConfig(**SAMPLING), torch.device("cpu")
        _, asked = load_queries(data, LOOKED, wrap=True)
        start = Player(ModelConfig(path=self.model), run, device)
        player = start if path == self.model else Player(ModelConfig(path=path), run, device)
        found, samples = player.answer(asked, range(len(asked)), data, rollout, n=1, seed=(seed,))
        before = start.logp(samples, rollout.temperature)
        kl = [sum(sample.logp) - ref for sample, ref in zip(samples, before, strict=True)]
        answers = [row["completion"] for row in found]
        scores = self.scorer()([row["prompt"] for row in found], answers)
        return {"kl": float(np.mean(kl)), "answers": answers, "proxy": scores["proxy"], "gold": scores["gold"]}

    def scorer(self) -> Scorer:
        return Scorer({name: RewardPart(model=getattr(self, name)) for name in ("proxy", "gold")})

    def online(self, folder: Path, seed: int) -> dict[str, Any]:
        values = {
            "model": {"path": self.model}, "data": self.prompts,
            "judge": {"reward": {"proxy": {"model": self.proxy}}}, "watch": {"gold": {"model": self.gold}},
            "rollout": {"prompts": 48, "samples": 4, **SAMPLING}, "unfinished": "keep", "rounds": 4,
            "loss": {"name": "dpo", "settings": {"beta": 0.1}}, "train": {"epochs": 1, "batch_size": 8},
            "optimizer": {"lr": 5e-6, "warmup": 0.1, "schedule": "linear"},
        }  # fmt: skip
        return verb(online_dpo, online_dpo.OnlineDPORecipe, folder, seed, values)

    def best_of_n(self, folder: Path, seed: int) -> dict[str, Any]:
        """The first model's answers to the held-out prompts, 16 to each, with both judges' scores."""
        folder.mkdir(parents=True, exist_ok=True)
        drawn = folder / "drawn.jsonl"
        recipe = {
            "model": {"path": self.model}, "data": {"path": str(self.out / "asked.jsonl")}, "out": str(drawn),
            "rollout": {"samples": DRAWN, **SAMPLING, "held_out": 0}, "run": {"seed": seed + 7, "threads": 1},
        }  # fmt: skip
        generate.run(generate.GenerateRecipe.model_validate(recipe))
        answers = rows(drawn)
        scores = self.scorer()([r["prompt"] for r in answers], [r["completion"] for r in answers])
        kept = {"proxy": scores["proxy"], "gold": scores["gold"], "answers": [r["completion"] for r in answers]}
        write_atomic(folder / "scores.json", json.dumps(kept))
        return done(folder)


def done(folder: Path) -> dict[str, Any]:
    """Leaves the summary by which a cell that no verb ran is known to have ended, and returns it."""
    summary = {"finished": True}
    write_atomic(folder / "summary.json", json.dumps(summary))
    return summary


WAYS = {"best-of-n": Start.best_of_n, "ppo": Start.ppo, "online-dpo": Start.online}


def best_of(folder: Path) -> list[Look]:
    """Best of 1 to 16 by the proxy: gold in expectation over which of the 16 were drawn; KL is log n - (n - 1) / n.

    That KL is an upper bound (arXiv 2401.01879). Variety is that of each prompt's best of its first n.
    """
    kept = json.loads((folder / "scores.json").read_text())
    proxy, gold = (np.array(kept[name]).reshape(-1, DRAWN) for name in ("proxy", "gold"))
    order = np.argsort(proxy, axis=1)
    looks = []
    for n in BEST_OF:
        weight = np.array([math.comb(i, n - 1) / math.comb(DRAWN, n) for i in range(DRAWN)])
        by = [np.take_along_axis(scores, order, axis=1) @ weight for scores in (proxy, gold)]
        first = [kept["answers"][row * DRAWN + int(np.argmax(of_prompt[:n]))] for row, of_prompt in enumerate(proxy)]
        looks.append(Look(math.log(n) - (n - 1) / n, by[1], float(by[0].mean()), variety(first)))
    return looks


def ppo_looks(folder: Path) -> list[Look]:
    return [
        Look(look["kl"], np.array(look["gold"]), float(np.mean(look["proxy"])), variety(look["answers"]))
        for look in json.loads((folder / "looks.json").read_text())
    ]


def variety(answers: list[str]) -> float:
    """Distinct-2 within each answer, on average."""
    return float(np.mean(BUILTINS["distinct_n"](prompts=answers, completions=answers)))


READERS = {
    "best-of-n": best_of,
    "ppo": ppo_looks,
    "ppo-trl": ppo_looks,
    "online-dpo": lambda f: arena(f)[0],
}


Record = dict[str, dict[str, list[Look]]]
"""By way and seed, the looks of a run."""


def recorded(out: Path, file: Path, seeds: list[int]) -> Record:
    """What `file` has on record, with the runs of these seeds that are finished; they join the record."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    found = {
        way: {seed: [Look(**{**x, "gold": np.array(x["gold"])}) for x in looks] for seed, looks in cells.items()}
        for way, cells in kept.items()
    }
    for way, read in READERS.items():
        cells = found.setdefault(way, {})
        for seed in seeds:
            if finished(out / f"{way}-{seed}") is not None:
                cells[str(seed)] = read(out / f"{way}-{seed}")

    def plain(look: Look) -> dict[str, Any]:
        return {**asdict(look), "gold": np.round(look.gold, 5).tolist()}

    kept = {way: {seed: [*map(plain, cells[seed])] for seed in sorted(cells)} for way, cells in found.items()}
    write_atomic(file, json.dumps(kept) + "\n")
    return found


def table(out: Path, found: Record) -> str:
    """Both judges' accuracy, gold at equal KL by way, every look, and answers to read."""
    lines = ["| judge | right on held-out pairs |", "| --- | --- |"]
    for name in ("proxy", "gold"):
        looks = [r for r in rows(out / f"{name}-judge/metrics.jsonl") if "held_out/accuracy" in r]
        lines.append(f"| {name} | {looks[-1]['held_out/accuracy']:.2f} of {len(rows(out / 'held_out.jsonl'))} |")
    head = "".join(f" | gold at {level:g}" for level in LEVELS)
    lines += ["", f"| way | seeds{head} | its last gold | its proxy | its KL | distinct-2 |", "| --- " * 9 + "|"]
    every = ["| way | seed | KL | proxy | gold | distinct-2 |", "| --- " * 6 + "|"]
    for way, cells in found.items():
        if not cells:
            continue
        at = [interval([x for looks in cells.values() if (x := at_kl(looks, level)) is not None]) for level in LEVELS]
        last = [looks[-1] for looks in cells.values()]
        means = [float(np.mean([getattr(x, name) for x in last])) for name in ("proxy", "kl", "distinct2")]
        numbers = " | ".join(f"{x:.2f}" for x in means)
        lines.append(f"| {way} | {len(cells)} | {' | '.join(at)} | {interval([x.gold for x in last])} | {numbers} |")
        for seed, looks in sorted(cells.items()):
            for x in looks:
                gold = interval([x.gold])
                every.append(f"| {way} | {seed} | {x.kl:.2f} | {x.proxy:.3f} | {gold} | {x.distinct2:.2f} |")
    return "\n".join([*lines, "", *every])


def interval(values: list[Array]) -> str:
    got = estimate(values)
    return "" if got is None else f"{got['mean']:+.3f} ± {got['half']:.3f}"


def examples(out: Path, seed: int) -> list[str]:
    """Answers to four held-out prompts: the model's before, and those of each way that trains after it."""
    drawn = rows(out / f"best-of-n-{seed}/drawn.jsonl")[::DRAWN]
    said = {"before": [row["completion"] for row in drawn]}
    texts = rows(out / f"ppo-{seed}/samples.jsonl")
    if texts:
        end = max(row["step"] for row in texts)
        at = sorted((row for row in texts if row["step"] == end), key=lambda row: row["index"])
        said["ppo"] = [row["completion"] for row in at]
    of_peer = out / f"ppo-trl-{seed}"
    if finished(of_peer) is not None:
        said["ppo-trl"] = json.loads((of_peer / "looks.json").read_text())[-1]["answers"]
    rounds = sorted((out / f"online-dpo-{seed}").glob("round-*/held-out.jsonl"))
    if rounds:
        said["online-dpo"] = [r["completion"] for r in sorted(rows(rounds[-1]), key=lambda row: row["index"])]
    lines = []
    for i in range(0, LOOKED, LOOKED // 4):
        asked = drawn[i]["prompt"]
        lines.append(f"    {'asked':11} {(asked if isinstance(asked, str) else asked[-1]['content'])!r}")
        lines += [f"    {way:11} {answers[i]!r}" for way, answers in said.items()] + [""]
    return lines


def main() -> None:
    parser = options(__doc__, ("run", "table"), "runs/chat-people")
    parser.add_argument("--model", type=Path, help="the folder of the chat model")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--peer", help="a Python that has TRL 1.12")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    args = parser.parse_args()
    if args.what == "table":
        found = recorded(args.out, args.docs / "chat-people.json", args.seeds)
        said = "\n".join(examples(args.out, args.seeds[0]))
        return rewrite(args.docs / "chat-people.md", f"{table(args.out, found)}\n\n{said.rstrip()}\n")
    write_pairs(args.model, args.data, args.out)
    start = Start(args.model, args.out)
    if args.peer:
        WAYS["ppo-trl"] = partial(Start.ppo_trl, peer=args.peer)
        args.ways = [*args.ways, "ppo-trl"]
    run_cells(
        [
            (args.out / f"{way}-{seed}", partial(WAYS[way], start, args.out / f"{way}-{seed}", seed))
            for seed in args.seeds
            for way in args.ways
        ],
        args.minutes,
    )
    for seed in args.seeds:
        folder = args.out / f"ppo-{seed}"
        if finished(folder) is not None and not (folder / "looks.json").exists():
            start.read_again(folder)


if __name__ == "__main__":
    main()
