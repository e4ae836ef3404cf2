"""The candidate of a turn: lessons in tables, and the verbs that train on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from steersman.data import read_rows
from steersman.people.filters import prompt_key
from steersman.people.judgements import Judgement
from steersman.people.wheel.lessons import Kind, lessons, mix_rows
from steersman.people.wheel.recipe import LEARNS, Stage, WheelRecipe
from steersman.run.files.ledger import Ledger, Rows
from steersman.verbs import feedback as thumbs
from steersman.verbs import preference, reward_model, rl, sft
from steersman.verbs.on_policy_recipes import RECIPES
from steersman.verbs.preference import PreferenceRecipe
from steersman.verbs.reward_model import RewardModelRecipe
from steersman.verbs.sft import SFTRecipe


class Training:
    """One turn's training, in the folder `name` of the ledger; `chats` says whether the model has a chat template."""

    def __init__(self, ledger: Ledger, recipe: WheelRecipe, name: str, *, chats: bool) -> None:
        self.ledger, self.recipe, self.name, self.chats = ledger, recipe, name, chats

    def tables(self, new: list[Judgement], earlier: list[Judgement]) -> dict[Kind, Rows]:
        """Tables of the lessons that the recipe's stages train on, mixed at its shares; without new ones none."""
        about = {
            "made_from": self.ledger.sources(f"{self.name}/kept"),
            "mix": self.recipe.mix.model_dump(mode="json"),
        }
        kinds: list[Kind] = list(dict.fromkeys(LEARNS[stage] for stage in self.recipe.then))
        return {
            kind: self.ledger.table(f"{self.name}/{kind}", partial(self._rows, new, earlier, kind), **about)
            for kind in kinds
        }

    def _rows(self, new: list[Judgement], earlier: list[Judgement], kind: Kind) -> Rows:
        fresh, mix = lessons(new, kind), self.recipe.mix
        if not fresh:
            return []
        anchor = [row.data for row in read_rows(mix.anchors[kind])] if mix.anchor else []
        return mix_rows(fresh, lessons(earlier, kind), anchor, mix, self.recipe.run.seed)

    def run(self, path: str, tables: dict[Kind, Rows]) -> str:
        """Trains stage after stage, leaving out those without rows; gives the candidate's folder."""
        stages: dict[Stage, Callable[[str, str], str]] = {
            "sft": self._sft, "kto": self._kto, "dpo": self._dpo, "ppo": self._ppo,
        }  # fmt: skip
        for place, stage in enumerate(self.recipe.then, 1):
            if tables[LEARNS[stage]]:
                path = stages[stage](f"{self.name}/{place}-{stage}", path)
            else:
                self.ledger.log.note(f"{self.name}: no judgement teaches {stage}, so it is left out", style="yellow")
        return path

    def _file(self, kind: str) -> str:
        return str(self.ledger.path / f"{self.name}/{kind}.jsonl")

    def _values(self, stage: Stage, path: str) -> dict[str, Any]:
        return self.recipe.stage(stage, path, self._file(LEARNS[stage]), chats=self.chats)

    def _sft(self, name: str, path: str) -> str:
        return self.ledger.stage(name, sft.run, SFTRecipe.model_validate, self._values("sft", path))["model"]

    def _kto(self, name: str, path: str) -> str:
        values = self._values("kto", path)
        return self.ledger.stage(name, thumbs.run, thumbs.RECIPES["kto"].model_validate, values)["model"]

    def _dpo(self, name: str, path: str) -> str:
        values = self._values("dpo", path)
        return self.ledger.stage(name, preference.run, PreferenceRecipe.model_validate, values)["model"]

    def _ppo(self, name: str, path: str) -> str:
        """A reward model from the pairs, and PPO toward it on their prompts."""
        ledger, values = self.ledger, self._values("ppo", path)
        reward = ledger.stage(f"{name}-reward", reward_model.run, RewardModelRecipe.model_validate, values)["model"]
        pairs = ledger.rows(f"{self.name}/pairs")
        prompts = {prompt_key(row["prompt"]): row["prompt"] for row in pairs}
        asked = ledger.table(f"{self.name}/prompts", lambda: [{"prompt": p} for p in prompts.values()])
        values = self.recipe.ppo_stage(path, self._file("prompts"), reward, len(asked), chats=self.chats)
        return ledger.stage(name, rl.run, RECIPES["ppo"].model_validate, values)["model"]
