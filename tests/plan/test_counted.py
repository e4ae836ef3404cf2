"""What a plan counts of a recipe's models, against what the run itself loads and trains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import tiny_config, tiny_pair_config
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    MixtralConfig,
    PhimoeConfig,
    Qwen3MoeConfig,
)

from steersman.assets import story_model
from steersman.config.load import load_recipe
from steersman.model import LoraConfig, adapted, load_policy, load_scalar, save, shape_of
from steersman.plan.costs import seconds
from steersman.plan.devices import cluster
from steersman.plan.layouts import Layout, Role, Work
from steersman.setup.models import policy_from, scalar_from
from steersman.train.roles import serves_as_critic
from steersman.types import SteersmanError
from steersman.verbs.on_policy_recipes import RECIPES as ON_POLICY
from steersman.verbs.plan import KINDS, PlanRecipe, roles_of
from steersman.verbs.plan import run as plan

STORY = str(story_model())
SPARSE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def config_of(family: str, vocab: int) -> Any:
    if family == "qwen-moe":
        return Qwen3MoeConfig(
            **SPARSE, vocab_size=vocab, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8
        )
    if family == "mixtral":
        return MixtralConfig(**SPARSE, vocab_size=vocab, num_local_experts=4, num_experts_per_tok=2)
    if family == "phimoe":
        return PhimoeConfig(**SPARSE, vocab_size=vocab, num_local_experts=4, num_experts_per_tok=2)
    return tiny_pair_config(family, vocab) if family in ("t5", "bart") else tiny_config(family, vocab)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes a tiny model of a family, with the story model's tokenizer; its folder."""
    tokenizer, root = AutoTokenizer.from_pretrained(STORY), tmp_path_factory.mktemp("models")

    def write(family: str) -> str:
        place = root / family
        if not place.exists():
            config = config_of(family, len(tokenizer))
            auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            auto.from_config(config).save_pretrained(place)
            tokenizer.save_pretrained(place)
        return str(place)

    return write


def learned(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", LoraConfig(r=4)),
        ("llama", LoraConfig(r=4, targets=["q_proj", "v_proj"])),
        ("llama", LoraConfig(r=4, targets=r".*layers\.1\.mlp\..*_proj", dora=True)),
        ("llama", LoraConfig(r=4, train_whole=("embed_tokens", "lm_head", "norm"))),
        ("gpt2", LoraConfig(r=4)),
        ("gemma3", LoraConfig(r=4)),
        ("qwen-moe", LoraConfig(r=4)),
        ("mixtral", LoraConfig(r=4)),
        ("phimoe", LoraConfig(r=4)),  # its routers are linear layers of their own kind, which get none
        ("t5", LoraConfig(r=4)),
        ("bart", LoraConfig(r=4, targets=["q_proj", "fc1"])),
    ],
)
def test_as_much_is_counted_as_the_run_trains(folder, family, lora):
    path = folder(family)
    assert adapted(path, lora).trained == learned(load_policy(path, lora=lora))
    critic = load_scalar(path)
    assert shape_of(path).scalar().parameters == pytest.approx(sum(p.numel() for p in critic.parameters()), abs=1100)
    critic.adapt(lora)
    assert adapted(path, lora, scalar=True).trained == learned(critic)


def test_a_token_passes_some_experts_of_a_mixture(folder):
    dense, sparse = shape_of(folder("llama")), shape_of(folder("qwen-moe"))
    assert dense.active == dense.parameters
    assert sparse.parameters - sparse.active == 2 * (8 - 2) * 3 * 32 * 24
    assert sparse.inner == 2 * 24
    assert shape_of(folder("mixtral")).inner == 2 * 48
    work, there = Work(8, 16, 16, 1, 1024), cluster("1xH100-80GB")
    took = seconds(Layout("one", 1), [Role("actor", sparse, sparse.parameters)], work, there)
    assert took["train"] == pytest.approx(6 * sparse.active * 8 * 32 / (989e12 * 0.4))


def test_what_the_targets_do_not_match_is_refused(folder):
    with pytest.raises(SteersmanError, match="linear layers are called"):
        adapted(folder("llama"), LoraConfig(targets=["nothing"]))


@pytest.fixture
def recipe(tmp_path):
    """The recipe of one GPU on the story model, with these keys changed."""

    def write(verb: str = "ppo", *words: str, **sections: Any) -> Any:
        told = yaml.safe_load(Path("recipes/scale/1-gpu.yaml").read_text())
        told["model"] = {"path": STORY, "dtype": "float32", **sections.pop("model", {})}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(told | sections))
        return load_recipe(ON_POLICY[verb], tmp_path / "recipe.yaml", list(words))

    return write


def of(recipe: Any, size: str = "") -> dict[str, Role]:
    return {role.name: role for role in roles_of(recipe, size)}


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A reward model four times as deep as the story model, with its tokenizer."""
    tokenizer, place = AutoTokenizer.from_pretrained(STORY), tmp_path_factory.mktemp("judge")
    config = tiny_config("llama", len(tokenizer))
    config.num_hidden_layers, config.pad_token_id = 8, tokenizer.pad_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    scalar = load_scalar(place)
    save(scalar, scalar.tokenizer, place / "reward")
    return str(place / "reward")


def test_the_actor_and_the_critic_are_those_of_the_run(recipe):
    lora = {"r": 4, "targets": ["q_proj", "v_proj"], "train_whole": ["norm"]}
    asked = recipe(model={"lora": lora})
    found = of(asked)
    cpu = torch.device("cpu")
    assert found["actor"].trained == learned(policy_from(asked.model, asked.run, cpu))
    assert found["critic"].trained == learned(scalar_from(asked.model, asked.run, cpu))
    assert not found["reference"].owns_base


def test_adapters_of_a_reward_model_stand_on_the_shared_base(recipe, tmp_path):
    judge = load_scalar(STORY)
    judge.adapt(LoraConfig(r=4))
    save(judge, judge.tokenizer, tmp_path / "judge", merged=False)
    path = str(tmp_path / "judge")
    asked = recipe(model={"lora": {"r": 8}}, share="base", reward={"parts": {"judge": {"model": path}}})
    found = of(asked)
    assert not found["reward judge"].owns_base
    assert found["reward judge"].adapter_parameters == adapted(STORY, LoraConfig(r=4)).adapters
    assert found["critic"].trained == learned(judge)  # which begins as the reward model
    assert not found["critic"].owns_base
    for file in tmp_path.glob("judge/*token*"):
        file.unlink()
    assert of(asked) == found


@pytest.fixture
def adapters_as_judge(tmp_path) -> str:
    """A folder of adapters of rank 16, with a head, on the story model."""
    scalar = load_scalar(STORY)
    scalar.adapt(LoraConfig(r=16))
    save(scalar, scalar.tokenizer, tmp_path / "judge", merged=False)
    return str(tmp_path / "judge")


def test_saved_adapters_are_counted_at_another_size(recipe, adapters_as_judge):
    parts = {"parts": {"people": {"model": adapters_as_judge}}}
    found = of(recipe(model={"lora": {"r": 4}}, share="base", reward=parts), "7b")
    inside, width, layers = 4096, 11008, 32  # of Llama 2 7B: q, k, v and o are square; gate, up and down
    linear = 4 * (inside + inside) + 3 * (inside + width)
    assert found["reward people"].adapter_parameters == 16 * linear * layers
    assert found["actor"].adapter_parameters == 4 * linear * layers
    assert not found["reward people"].owns_base


def test_the_page_about_a_large_chat_model_says_what_its_command_plans(adapters_as_judge, tmp_path):
    page = Path("docs/how-to/chat-model.md").read_text().split("## 7B on 24 GB")[1].split("\n## ")[0]
    written = "\n".join(re.findall(r"^    ((?:model|data|reward|rollout): .*)", page, re.MULTILINE))
    written = written.replace("/models/chat", STORY).replace("runs/rm/model", adapters_as_judge)
    (words,) = re.findall(r"^    steersman plan ppo-7b.yaml (.*)", page, re.MULTILINE)
    file, in_all = tmp_path / "ppo-7b.yaml", r"in all \| ([\d.]+) GB \| ([\d.]+) GB"
    apart, (shared, narrow) = re.findall(r"comes to ([\d.]+) GB, what", page)[0], re.findall(in_all, page)[0]
    for wanted, more in ((apart, []), (shared, ["base"]), (narrow, ["base", "nf4"])):
        told = yaml.safe_load(written)
        told |= {"share": more[0]} if more else {}
        told["model"] |= {"quantise": more[1]} if len(more) > 1 else {}
        file.write_text(yaml.safe_dump(told))
        planned = plan(load_recipe(PlanRecipe, None, ["--recipe", str(file), *words.split()]))["layouts"]
        assert f"{next(one['peak_bytes'] for one in planned if one['name'] == 'replicas') / 1e9:.1f}" == wanted


@pytest.mark.parametrize("init", ["folder", "auto", "policy"])
def test_a_critic_has_the_shape_of_what_it_begins_from(recipe, judge, init):
    given = judge if init == "folder" else init
    asked = recipe(
        model={"lora": None}, critic={"init": given}, reward={"parts": {"judge": {"model": judge}}}, reference="none",
        algorithm={"beta": 0.0},
    )  # fmt: skip
    found = of(asked)
    whole = learned(load_scalar(STORY if init == "policy" else judge))
    assert found["critic"].trained == found["critic"].shape.parameters == whole
    assert found["reward judge"].shape.parameters == learned(load_scalar(judge))


def test_a_reference_of_its_own_folder_counts_with_its_own_weights(recipe, folder):
    path = folder("llama")
    found = of(recipe(model={"lora": {}}, reference=path))[f"reference {path}"]
    assert found.owns_base
    assert found.shape.parameters == learned(load_policy(path))


def test_the_policy_that_masks_another_is_counted(recipe):
    assert of(recipe("nlpo"))["masking policy"].shape == shape_of(STORY)


@pytest.mark.parametrize(("loss", "models"), [("dpo", ["model", "reference"]), ("orpo", ["model"])])
def test_pairs_have_a_reference_where_the_loss_reads_one(tmp_path, loss, models):
    words = ["--model.path", STORY, "--data.path", "pairs.jsonl", "--loss.name", loss, "--samples.prompts", "0"]
    assert [role.name for role in roles_of(load_recipe(KINDS["dpo"], None, words), "")] == models


def test_saved_adapters_are_counted_as_they_are(tmp_path):
    policy = load_policy(STORY, lora=LoraConfig(r=4, targets=["q_proj"]))
    save(policy, policy.tokenizer, tmp_path / "adapters", merged=False)
    path = str(tmp_path / "adapters")
    assert shape_of(path).parameters == shape_of(STORY).parameters
    assert adapted(path, LoraConfig(r=64)).trained == learned(policy)


def test_a_model_without_a_config_is_refused_by_name(tmp_path):
    words = ["--model.path", STORY, "--model.scratch", "{model_type: llama}", "--data.path", "a.txt"]
    asked = load_recipe(KINDS["sft"], None, words)
    with pytest.raises(SteersmanError, match=r"model\.scratch"):
        roles_of(asked, "")
    assert roles_of(asked, "135m")[0].trained == shape_of("135m").parameters


@pytest.mark.parametrize(
    ("attributes", "same_tokens", "on_the_base", "serves"),
    [(0, True, True, True), (1, True, True, True), (2, True, True, False), (0, False, True, False),
     (0, True, False, False)],
)  # fmt: skip
def test_a_critic_begins_from_a_reward_model_of_one_number_alone(attributes, same_tokens, on_the_base, serves):
    assert serves_as_critic(attributes, same_tokens=same_tokens, on_the_base=on_the_base) == serves
