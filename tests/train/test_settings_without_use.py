"""Settings that nothing would read are refused by their key; left at their defaults they are no fault."""

from __future__ import annotations

import pytest
from train_kit import merge

from steersman.distill.recipe import DistillRecipe
from steersman.verbs.on_policy_recipes import RECIPES
from steersman.verbs.preference import PreferenceRecipe
from steersman.verbs.reward_recipe import RewardModelRecipe

REWARD = {"parts": {"score": {"builtin": "length"}}}
OFFLINE = {"model": {"path": "m"}, "data": {"path": "d"}}
ONLINE = {**OFFLINE, "reward": REWARD}
TAUGHT = {**OFFLINE, "teacher": {"path": "t"}}
AHEAD = {"rollout.engine": "process", "rollout.ahead": 1}


@pytest.mark.parametrize(
    ("recipe", "base", "idle", "needed", "said"),
    [
        (RECIPES["dapo"], ONLINE, {"algorithm.kl_target": 8}, {"algorithm.beta": 0.1},
         r"algorithm\.kl_target 8 steers algorithm\.beta, and a beta of 0 stays 0.*first algorithm\.beta"),
        (RECIPES["ppo"], ONLINE, {"algorithm.kl_target": 8, "algorithm.beta": 0}, {"algorithm.beta": 0.1},
         r"algorithm\.kl_target 8 steers algorithm\.beta, and a beta of 0 stays 0"),
        (RECIPES["ppo"], ONLINE, {"algorithm.kl_target": 8, "reference": "none"}, {"reference": "start"},
         r"algorithm\.kl_target 8 .* without a reference no KL is measured"),
        (RECIPES["ppo"], ONLINE, {"algorithm.kl_horizon": 50}, {"algorithm.kl_target": 8}, r"algorithm\.kl_horizon"),
        (RECIPES["ppo"], ONLINE, {"critic.init": "shared", "critic.optimizer.lr": 1e-3}, {"critic.init": "policy"},
         r"critic\.optimizer: a shared critic"),
        (RECIPES["ppo"], ONLINE, {"critic.vf_coef": 1.0}, {"critic.init": "shared"}, r"critic\.vf_coef"),
        (RECIPES["ppo"], ONLINE, {"rollout.correction.kind": "none"}, {"rollout.recompute_logp": True},
         r"rollout\.correction .*rollout\.recompute_logp: true"),
        (RECIPES["ppo"], ONLINE, {"rollout.in_flight": "cut"}, AHEAD, r"rollout\.in_flight cut .*rollout\.ahead"),
        (PreferenceRecipe, OFFLINE, {"loss.name": "simpo", "reference": "folder"}, {"samples.prompts": 4},
         r"reference: simpo has none, so the model in folder is never read"),
        (PreferenceRecipe, OFFLINE, {"anchor_share": 0.5}, {"anchor": "folder"}, r"anchor_share .* give anchor"),
        (RewardModelRecipe, OFFLINE, {"train.bottleneck_weight": 1}, {"train.bottleneck": 4},
         r"train\.bottleneck_weight: there is no bottleneck"),
        (DistillRecipe, TAUGHT, {"reward": REWARD, "train.batch_size": 1}, {"rollout.samples": 2},
         r"reward: .*train\.batch_size 1 with rollout\.samples 1"),
        (DistillRecipe, TAUGHT, {"loss.reward_weight": 3}, {"reward": REWARD}, r"loss\.reward_weight"),
    ],
)  # fmt: skip
def test_a_setting_that_nothing_reads_is_refused_by_its_key(recipe, base, idle, needed, said):
    with pytest.raises(ValueError, match=said):
        recipe.model_validate(merge(base, idle))
    recipe.model_validate(merge(base, {**idle, **needed}))
    recipe.model_validate(base)


def test_a_loss_that_takes_no_anchor_is_not_offered_to_those_who_give_one():
    with pytest.raises(ValueError, match=r"anchor: .* and tdpo1 takes more") as told:
        PreferenceRecipe.model_validate(merge(OFFLINE, {"loss.name": "tdpo1", "anchor": "folder"}))
    offered = str(told.value).split("use one of ")[1].split(" [")[0].split(", ")
    assert "dpo" in offered
    averaged = {"loss.name": "ipo", "loss.settings": {"length_normalised": 1}, "anchor": "folder"}
    with pytest.raises(ValueError, match="with length_normalised"):
        PreferenceRecipe.model_validate(merge(OFFLINE, averaged))
    for more in ({"loss.ld_alpha": 0.5}, {"loss.also": {"bco_pair": 1.0}}):
        with pytest.raises(ValueError, match="anchor: the mixture of two references is known"):
            PreferenceRecipe.model_validate(merge(OFFLINE, {"anchor": "folder", **more}))
    for name in offered:
        PreferenceRecipe.model_validate(merge(OFFLINE, {"loss.name": name, "anchor": "folder"}))
