"""What an asynchronous run should have done, done again by one process that knows nothing of threads or servers.

The run's reward writes down every sample that it sees (`reward_file`). `check` takes the order of prompts, the
weights of each version and the update from the synchronous loop, and what was sampled from that record.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.data import Batches
from steersman.jsonl import read_jsonl
from steersman.reward import Scores
from steersman.train.experience import tokens_of
from steersman.train.on_policy import Clock, OnPolicy
from steersman.train.roles import build_roles
from steersman.types import Prompt, Sample
from steersman.verbs.on_policy_recipes import RECIPES
from steersman.verbs.rl import _prompts

REWARD = '''
import json, time

TRACE, SECONDS = {trace!r}, {seconds}

def score(prompts, completions, samples):
    """A slow reward: how often an answer says "the"; everything that it sees goes to the record."""
    time.sleep(SECONDS)
    assert all(s.support is None for s in samples)
    rows = [
        dict(prompt=s.prompt.text, index=s.index, ids=s.ids, logp=s.logp, version=s.version, finish=s.finish,
             text=s.text)
        for s in samples
    ]
    if TRACE:
        with open(TRACE, "a") as file:
            file.write(json.dumps(rows) + "\\n")
    return [c.count("the") / 4 for c in completions]
'''


def reward_file(path: Path, trace: str, seconds: float) -> str:
    """Writes the reward's file, and gives what a recipe calls it."""
    path.write_text(REWARD.format(trace=trace, seconds=seconds))
    return f"{path}:score"


def recorded(trace: Path) -> dict[frozenset[str], list[dict[str, Any]]]:
    """The samples of each batch by its prompts; of a batch that was sampled several times, the last. A kill may have
    cut a line."""
    found = {}
    for line in trace.read_text().splitlines():
        try:
            rows = json.loads(line)
        except ValueError:
            continue
        found[frozenset(row["prompt"] for row in rows)] = rows
    return found


class Replay(OnPolicy):
    """The synchronous loop over recorded samples.

    `gap` is the largest difference of a recorded log-probability from that of the weights of its version, `unlike`
    counts samples that those weights, in this process, draw otherwise.
    """

    def __init__(self, recipe: Any, trace: Path, *, ahead: int, draws_the_same: bool) -> None:
        roles = build_roles(recipe, torch.device("cpu"))
        train, _, _ = _prompts(recipe, roles.policy)
        batches = Batches(len(train), recipe.rollout.prompts, recipe.run.seed, shuffle=True, drop_last=True)
        super().__init__(recipe, roles, train, batches)
        self.trace, self.ahead, self.draws_the_same = recorded(trace), ahead, draws_the_same
        self.due: list[list[int]] = []
        self.versions: dict[int, dict[str, Tensor]] = {}
        self.gap, self.unlike = 0.0, 0

    def next_samples(self, clock: Clock) -> tuple[list[Sample], Scores]:
        prompts = self.next_prompts()
        self.due.append([p.index for p in prompts])
        self.versions[self.done] = {k: v.clone() for k, v in self.roles.policy.state_dict().items()}
        self.versions.pop(self.done - self.ahead - 1, None)
        rows = self.trace[frozenset(p.text for p in prompts)]
        home = {p.text: p for p in prompts}
        samples = [Sample(home[row.pop("prompt")], mask=None, support=None, **row) for row in map(dict, rows)]
        for version in sorted({v for s in samples for v in s.version or []}):
            self._compare(samples, prompts, version)
        return samples, self.roles.reward.score(samples)

    @torch.no_grad()
    def _compare(self, samples: list[Sample], prompts: Sequence[Prompt], version: int) -> None:
        """Under the weights of that version: the log-probabilities of its tokens, and the same draw once more."""
        policy = self.roles.policy
        policy.load_state_dict(self.versions[version])
        tokens = tokens_of(samples)
        logp = policy.logp(tokens, temperature=self.recipe.rollout.temperature).logp
        for row, sample in enumerate(samples):
            own = torch.tensor(sample.version) == version
            gaps = (logp[row, : len(own)] - torch.tensor(sample.logp))[own]
            self.gap = max(self.gap, float(gaps.abs().max()) if len(gaps) else 0.0)
        if self.draws_the_same:
            seed, n = (self.recipe.run.seed, self.done), self.recipe.rollout.samples
            drawn = self.roles.engine.generate(prompts, self.roles.sampling, n=n, seed=seed, record_support=True)
            self.unlike += sum(a.ids != b.ids or a.logp != b.logp for a, b in zip(drawn, samples, strict=True))
        policy.load_state_dict(self.versions[self.done])


def check(recipe: dict[str, Any], verb: str, trace: Path, *, limit: float, draws_the_same: bool) -> dict[str, Any]:
    """What is wrong with the finished run of this recipe, as words (none: nothing), and the largest gap in nats.

    Prompts used are prompts due; no token is older than `rollout.ahead` versions, and with `finish` each has exactly
    the version of the schedule; the newest checkpoint's weights and optimisers are those of the replay, bit for bit.
    """
    run, ahead = Path(recipe["run"]["dir"]), recipe["rollout"]["ahead"]
    cut = recipe["rollout"].get("in_flight") == "cut"
    alone = json.loads(json.dumps(recipe)) | {"run": recipe["run"] | {"dir": str(run.parent / "replay")}}
    alone["rollout"] = {k: v for k, v in recipe["rollout"].items() if k in SAMPLED}
    alone["reward"]["parts"]["the"]["function"] = reward_file(run.parent / "replayed.py", "", 0.0)
    loop = Replay(RECIPES[verb].model_validate(alone), trace, ahead=ahead, draws_the_same=draws_the_same)
    for _ in range(recipe["iterations"]):
        loop.iteration()
    wrong = []
    used = [row for row in read_jsonl(run / "rollouts.jsonl") if row["stands"] == "used"]
    if [row["prompts"] for row in used] != loop.due or [row["batch"] for row in used] != list(range(len(used))):
        wrong.append(f"prompts used {[row['prompts'] for row in used]}, due {loop.due}")
    for row in used:
        oldest, newest = max(0, row["batch"] - ahead), row["batch"] if cut else max(0, row["batch"] - ahead)
        if not oldest <= row["versions"][0] <= row["versions"][1] <= newest:
            wrong.append(f"batch {row['batch']} has versions {row['versions']}")
    if loop.gap > limit:
        wrong.append(f"a log-probability is {loop.gap:g} nats from that of its version")
    if loop.unlike:
        wrong.append(f"{loop.unlike} samples are not what their version draws")
    kept = max((run / "checkpoints").glob("step-*"))
    left = torch.load(kept / "state.pt", map_location="cpu", weights_only=True)["state"]["roles"]
    if unlike := sorted(differing(loop.roles.state_dict(), left)):
        wrong.append(f"not as replayed: {', '.join(unlike[:5])} and {max(len(unlike) - 5, 0)} more in {kept.name}")
    return {"wrong": wrong, "gap": loop.gap}


SAMPLED = {"prompts", "samples", "max_new_tokens", "held_out", "temperature", "recompute_logp", "correction"}
"""Keys of the section `rollout` that say what is sampled, not where."""


def differing(one: Any, other: Any, at: str = "") -> set[str]:
    """Where two nests of dicts, lists and tensors are not the same bits."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return {f"{at}: keys"}
        return {found for key in one for found in differing(one[key], other[key], f"{at}.{key}")}
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return {f"{at}: length"}
        return {x for i, (a, b) in enumerate(zip(one, other, strict=True)) for x in differing(a, b, f"{at}.{i}")}
    same = torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other
    return set() if same else {at}
