"""Templates that imitate well-known ones: turns as ids equal the template's own rendering, or are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from letter_models import letters
from tiny_models import tiny_model

from steersman.algorithms import ALGORITHMS
from steersman.data import Layout, end_ids
from steersman.data.encoder_decoder import PairLayout
from steersman.environments.calls import form_of
from steersman.environments.classes import ToolEnvironment, from_class
from steersman.environments.config import EnvironmentConfig
from steersman.environments.conversation import TurnLayout
from steersman.environments.play import EpisodeInPlay
from steersman.environments.port import Answer, Call, Reply
from steersman.environments.runner import Episodes
from steersman.model import Policy
from steersman.rollout import Engine, Sampling
from steersman.train.experience import tokens_of
from steersman.train.segments import SegmentRows
from steersman.types import Prompt, Sample, Segment, SteersmanError, Trajectory

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}{{ '<|im_start|>' + ('model' if m.role == 'assistant' "
    "else m.role) + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
HERMES = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{% if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>' + m.content + "
    "'</tool_response><|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% if m.tool_calls %}"
    "{% for t in m.tool_calls %}{{ '<tool_call>' + (t.function | tojson) + '</tool_call>' }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.last %}"
    "{{ '[TOOLS]' + (tools | tojson) }}{% endif %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{% if m.tool_calls %}{% set ns = namespace(all=[]) %}"
    "{% for t in m.tool_calls %}{% set ns.all = ns.all + [t.function] %}{% endfor %}"
    "{{ '[TOOL_CALLS] ' + (ns.all | tojson) + eos_token }}{% else %}"
    "{{ m.content + eos_token }}{% endif %}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and "
    "loop.index0 < ns.last %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_of(template: str):
    made = letters()
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def laid(template: str) -> TurnLayout:
    tokenizer = tokenizer_of(template)
    return TurnLayout(Layout(tokenizer, wrap_in_chat=True), end_ids(tokenizer))


USER = [{"role": "user", "content": "go on"}]
ASK = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, HERMES])
@pytest.mark.parametrize("ended", [True, False])
def test_turns_one_behind_the_other_are_the_rendered_conversation(template, ended):
    layout = laid(template)
    codec, render = layout.codec, layout.template.render
    ids, _ = layout.first(ASK)
    talk = list(ASK)
    for word in ("abc", "reply", "x y"):
        said = codec.more(word)
        ids = ids + said + ([codec.tokenizer.convert_tokens_to_ids("<|im_end|>")] if ended else [])
        talk += [{"role": "assistant", "content": word}, *USER]
        new, _ = layout.between(ASK, layout.stand_in(), USER, ended=ended)
        ids = ids + new
    whole = codec.rendered(render(talk, for_reply=True), first=True, own_template=True)
    assert ids == whole
    assert layout.rewriting(ASK, USER) is None


def test_a_template_that_drops_thoughts_is_refused_by_name_or_kept():
    assert "becomes" in laid(QWEN3).rewriting(ASK, USER)
    assert laid(QWEN3.replace("</think>", "</nothing>").replace("think", "")).rewriting(ASK, USER) is None


def test_a_template_that_moves_its_tools_is_refused():
    tools = [{**ASK[0], "tools": [{"type": "function", "function": {"name": "f"}}]}]
    assert "becomes" in laid(MISTRAL).rewriting(tools, USER)
    assert laid(MISTRAL).rewriting(ASK, USER) is None


def test_special_tokens_that_an_environment_writes_are_ordinary_text():
    layout = laid(CHATML)
    new, _ = layout.between(ASK, layout.stand_in(), [{"role": "user", "content": "<|im_end|>"}], ended=True)
    end = layout.codec.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert new.count(end) == 1  # the template's own, behind the user's turn


def test_forms_of_calls():
    assert form_of(laid(HERMES).template) == "tagged"
    assert form_of(laid(MISTRAL).template) == "listed"
    assert form_of(laid(CHATML).template) is None


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA])
def test_ids_and_mask_hold_for_families(family, template, worlds):
    tokenizer = tokenizer_of(template)
    model = tiny_model(family, vocab=len(tokenizer))
    layout = Layout(tokenizer, wrap_in_chat=True)
    ends = end_ids(tokenizer)
    config = EnvironmentConfig(path=f"{worlds}:Echo", max_turns=5)
    play = Episodes(
        Engine(model, tokenizer, eos_token_id=ends),
        from_class(config.path, {}, "tell", 99),
        layout,
        ends,
        config,
        128,
    )
    prompts = [Prompt([3], "", {}, i, [{"role": "user", "content": w}]) for i, w in enumerate(("hm", "look at"))]
    samples = play.generate(prompts, Sampling(5), n=2, seed=3)
    tokens = tokens_of(samples)
    logp = Policy(model, tokenizer).logp(tokens).logp
    for b, s in enumerate(samples):
        assert [sum(s.mask[t.begin : t.end]) for t in s.turns] == [t.end - t.begin for t in s.turns]
        assert sum(s.mask) == sum(t.end - t.begin for t in s.turns)
        mask = torch.tensor(s.mask)
        found = logp[b, : len(s.ids)][mask]
        torch.testing.assert_close(found, torch.tensor(s.logp)[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("chat", [True, False])
def test_ids_and_mask_hold_for_encoder_decoders(family, chat, worlds):
    """Each turn's encoder reads all that was said before it, and training reads what sampling read."""
    tokenizer = tokenizer_of(CHATML)
    model = tiny_model(family, vocab=len(tokenizer), scale=1.0)
    layout, ends = PairLayout(tokenizer, start=1, wrap_in_chat=chat), end_ids(tokenizer)
    config = EnvironmentConfig(path=f"{worlds}:Echo", max_turns=5)
    engine = Engine(model, tokenizer, eos_token_id=ends)
    play = Episodes(engine, from_class(config.path, {}, "tell", 99), layout, ends, config, 60)
    prompts = [Prompt([3], "", {}, i, [{"role": "user", "content": w}]) for i, w in enumerate(("hm", "oh"))]
    samples = play.generate(prompts, Sampling(4), n=2, seed=3)
    parts, whole = SegmentRows(samples), tokens_of(samples)
    logp = parts.join(Policy(model, tokenizer).logp(parts.tokens(whole)).logp, whole.mask.shape[1])
    recorded = torch.tensor([x for s in samples for x in s.logp])
    torch.testing.assert_close(logp[whole.mask], recorded, atol=1e-4, rtol=0)
    for s in samples:
        assert all(s.mask)  # nobody but the policy speaks into the decoder
        talk = list(s.prompt.turns)
        for turn, part in zip(s.turns, s.segments or [Segment(s.prompt.ids, 0, len(s.ids))], strict=True):
            shown = layout.template.render(talk, for_reply=True) if chat else "".join(m["content"] for m in talk)
            asked = layout.codec.rendered(shown, first=True, own_template=True) if chat else layout.codec.begin(shown)
            assert part.prompt == asked + ([] if asked[-1:] == layout.codec.suffix else layout.codec.suffix)
            assert (part.begin, part.end) == (turn.begin, turn.end)
            talk += [{"role": "assistant", "content": turn.reply}, {"role": "user", "content": turn.observation}]


def test_tools_without_a_template_for_them_are_refused_or_told(worlds):
    tokenizer = tokenizer_of(CHATML)
    layout, ends = Layout(tokenizer, wrap_in_chat=True), end_ids(tokenizer)
    engine = Engine(tiny_model("llama", vocab=len(tokenizer)), tokenizer, eos_token_id=ends)
    tools = ToolEnvironment([f"{worlds}:add"])
    with pytest.raises(SteersmanError, match="shows no tool calls; set "):
        Episodes(engine, tools, layout, ends, EnvironmentConfig(tools=["x"]), 128)
    play = Episodes(engine, tools, layout, ends, EnvironmentConfig(tools=["x"], tell_tools=True), 4096)
    game = EpisodeInPlay(Prompt([3], "", {}, 0, ASK), 0, 0, 0, 0)
    play.lay_out_opening(game, ASK, 4)
    assert '"name": "add"' in game.talk.prompt.text
    game.talk.add_reply(Sample(game.talk.prompt, [4, 5], [0.0, 0.0], "eos", "b"))
    game.reply = Reply("b", "b", (Call("add", {"a": 1, "b": 2}),))
    assert play.lay_out_answer(game, Answer([{"role": "tool", "name": "add", "content": "3"}]), 4)
    assert "user\n<unk>tool<unk>response<unk>" in tokenizer.decode(game.talk.ids)  # these letters have no <


FOLDER = next(
    (p / "env" / "cases_models" for p in Path(__file__).parents if (p / "env" / "cases_models").is_dir()), None
)


@pytest.mark.skipif(FOLDER is None, reason="needs the models that imitate families, made by shared/cases")
@pytest.mark.parametrize(
    ("name", "rewrites"),
    [("t_qwen3", True), ("t_r1", True), ("t_llama3", False), ("t_gemma", False), ("llama", False)],
)
def test_imitated_templates(name, rewrites):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER / name)
    layout = TurnLayout(Layout(tokenizer, wrap_in_chat=True), end_ids(tokenizer))
    assert (layout.rewriting(ASK, USER) is not None) == rewrites


@pytest.mark.skipif(FOLDER is None, reason="needs the models that imitate families, made by shared/cases")
@pytest.mark.parametrize("name", ["t_qwen3", "t_r1", "t_llama3", "t_gemma", "llama"])
def test_history_shown_anew_is_trained_as_it_was_shown(name, worlds):
    """Every turn stands behind what the template shows before it, and its log-probabilities are those of training."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert FOLDER is not None
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / name)
    model = AutoModelForCausalLM.from_pretrained(FOLDER / name).eval()
    layout, ends = Layout(tokenizer, wrap_in_chat=True), end_ids(tokenizer)
    config = EnvironmentConfig(path=f"{worlds}:Echo", max_turns=5, history="segments")
    engine = Engine(model, tokenizer, eos_token_id=ends)
    play = Episodes(engine, from_class(config.path, {}, "tell", 99), layout, ends, config, 1024)
    asked = [Prompt([3], "", {}, i, [{"role": "user", "content": word}]) for i, word in enumerate(("hm", "look at"))]
    samples = play.generate(asked, Sampling(5), n=2, seed=3)
    parts, whole = SegmentRows(samples), tokens_of(samples)
    logp = parts.join(Policy(model, tokenizer).logp(parts.tokens(whole)).logp, whole.mask.shape[1])
    recorded = torch.tensor([x for s in samples for x, m in zip(s.logp, s.mask, strict=True) if m])
    torch.testing.assert_close(logp[whole.mask], recorded, atol=1e-4, rtol=0)
    codec, render = layout.codec, layout.template.render
    for s in samples:
        talk = [{"role": "user", "content": s.prompt.turns[0]["content"]}]
        for turn in s.turns:
            part = next(p for p in s.segments or [Segment(s.prompt.ids, 0, len(s.ids))] if p.end >= turn.end)
            shown = codec.rendered(render(talk, for_reply=True), first=True, own_template=layout.template.own)
            assert tokenizer.decode(part.prompt + s.ids[part.begin : turn.begin]) == tokenizer.decode(shown)
            talk += [{"role": "assistant", "content": turn.reply}, {"role": "user", "content": turn.observation}]


@pytest.mark.skipif(FOLDER is None, reason="needs the models that imitate families, made by shared/cases")
@pytest.mark.parametrize(("name", "apart"), [("t_qwen3", True), ("t_llama3", False)])
def test_a_dropped_thought_begins_a_segment(name, apart, worlds):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert FOLDER is not None
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / name)
    layout, ends = Layout(tokenizer, wrap_in_chat=True), end_ids(tokenizer)
    engine = Engine(AutoModelForCausalLM.from_pretrained(FOLDER / name), tokenizer, eos_token_id=ends)
    config = EnvironmentConfig(path=f"{worlds}:Echo", history="segments")
    play = Episodes(engine, from_class(config.path, {}, "tell", 99), layout, ends, config, 1024)
    game = EpisodeInPlay(Prompt([3], "", {}, 0, ASK), 0, 0, 0, 0)
    play.lay_out_opening(game, ASK, 4)
    thought = layout.codec.more("<think>\nzzz\n</think>\n\nyes")
    ids = [*thought, next(i for i in ends if play.layout.tail.startswith(tokenizer.convert_ids_to_tokens(i)))]
    text = tokenizer.decode(thought)
    game.talk.add_reply(Sample(game.talk.prompt, ids, [0.0] * len(ids), "eos", text))
    game.reply = Reply(text, "yes")
    assert play.lay_out_answer(game, Answer(USER), 4)
    assert (len(game.earlier) == 1) == apart
    assert ("zzz" in tokenizer.decode(game.talk.context())) != apart


def test_segments_split_and_join_and_leave_advantages_the_episodes_own():
    both = Sample(Prompt([3], "", {}, 0), [4, 5, 6], [-1.0, -2.0, -3.0], "eos", mask=[True, False, True])
    both.segments = [Segment([3], 0, 1), Segment([3, 9, 9], 1, 3)]
    one = Sample(Prompt([3], "", {}, 0), [7, 8], [-4.0, -5.0], "eos", mask=[True, True])
    parts, whole = SegmentRows([both, one]), tokens_of([both, one])
    read = parts.tokens(whole)
    assert [read.response[i, : read.response_length[i]].tolist() for i in range(3)] == [[4], [5, 6], [7, 8]]
    assert read.prompt_length.tolist() == [1, 3, 1]
    steps = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(parts.join(parts.split(steps), 3)[whole.mask], steps[whole.mask])
    values = torch.arange(9.0).reshape(3, 3)
    assert parts.join(values, 4, after=1).tolist() == [[0.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 0.0]]
    reward = torch.tensor([[0.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    traj = Trajectory(whole.mask, reward, whole.mask.float(), steps, group=torch.tensor([0, 0]))
    advantage = ALGORITHMS["rloo"]().advantage(traj)
    split, apart = parts.experience(traj, advantage)
    assert apart.adv[0, 0] == advantage.adv[0, 0] == 1.0  # said before the reward, in another segment
    assert apart.adv[1, 1] == advantage.adv[0, 2] == 1.0
    assert split.group.tolist() == [0, 0, 0]
    assert split.mask.sum() == whole.mask.sum()
