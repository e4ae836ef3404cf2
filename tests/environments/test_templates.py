"""Templates that imitate well-known ones: turns as ids equal the template's own rendering, or are refused by name."""

from __future__ import annotations

import sys

import pytest
import torch
from imitations import CHATML, FIVE, GEMMA, HERMES, LLAMA3, MISTRAL, QWEN3, tokenizer_of
from tiny_models import PAIR_FAMILIES, tiny_model

from steersman.algorithms import ALGORITHMS
from steersman.data import Layout, template_ends
from steersman.data.encoder_decoder import PairLayout
from steersman.environments.agent import AgentEnvironment
from steersman.environments.calls import form_of
from steersman.environments.classes import FaultError, ToolEnvironment, from_class
from steersman.environments.config import EnvironmentConfig
from steersman.environments.conversation import TurnLayout
from steersman.environments.play import EpisodeInPlay, _as_messages
from steersman.environments.port import Answer, Call, Reply
from steersman.environments.runner import Episodes
from steersman.model import Policy
from steersman.rollout import Engine, Sampling
from steersman.train.experience import tokens_of
from steersman.train.segments import SegmentRows
from steersman.types import Prompt, Sample, Segment, SteersmanError, Trajectory


def laid(template: str) -> TurnLayout:
    tokenizer = tokenizer_of(template)
    return TurnLayout(Layout(tokenizer, wrap_in_chat=True), template_ends(tokenizer))


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


@pytest.mark.parametrize("template", FIVE)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3", *PAIR_FAMILIES])
def test_ids_mask_and_what_each_turn_is_said_behind(family, template, worlds):
    """Every turn stands behind what the template shows before it, and its log-probabilities are those of training."""
    tokenizer, pair = tokenizer_of(FIVE[template]), family in PAIR_FAMILIES
    model, ends = tiny_model(family, vocab=len(tokenizer), scale=1.0 if pair else 3.0), template_ends(tokenizer)
    layout = PairLayout(tokenizer, start=1, wrap_in_chat=True) if pair else Layout(tokenizer, wrap_in_chat=True)
    samples = echoed(model, layout, ends, worlds, history="segments")
    read_as_sampled(model, tokenizer, samples)
    codec, render = layout.codec, layout.template.render
    for s in samples:
        talk = list(s.prompt.turns)
        for turn in s.turns:
            part = next(p for p in parts_of(s) if p.end >= turn.end)
            shown = codec.rendered(render(talk, for_reply=True), first=True, own_template=True)
            seen = part.prompt + s.ids[part.begin : turn.begin]
            if pair:
                assert seen == shown + ([] if shown[-1:] == codec.suffix else codec.suffix)
                assert (part.begin, part.end) == (turn.begin, turn.end)
            # a model may say control tokens, which no text shows
            assert tokenizer.decode(seen, skip_special_tokens=True) == tokenizer.decode(
                shown, skip_special_tokens=True
            )
            talk += [{"role": "assistant", "content": turn.reply}, {"role": "user", "content": turn.observation}]


@pytest.mark.parametrize("family", PAIR_FAMILIES)
def test_encoder_decoders_read_plain_text_anew(family, worlds):
    tokenizer = tokenizer_of(CHATML)
    model, layout = tiny_model(family, vocab=len(tokenizer), scale=1.0), PairLayout(tokenizer, start=1)
    samples = echoed(model, layout, template_ends(tokenizer), worlds)
    read_as_sampled(model, tokenizer, samples)
    for s in samples:
        said = s.prompt.turns[0]["content"]
        for turn, part in zip(s.turns, parts_of(s), strict=True):
            asked = layout.codec.begin(said)
            assert part.prompt == asked + ([] if asked[-1:] == layout.codec.suffix else layout.codec.suffix)
            said += turn.reply + turn.observation


def echoed(model, layout, ends, worlds, **settings):
    """Episodes in class Echo; two turns of each at least fit."""
    config = EnvironmentConfig(path=f"{worlds}:Echo", max_turns=5, **settings)
    limit = 128 if layout.joined else 64
    tokenizer = layout.codec.tokenizer
    engine = Engine(model, tokenizer, eos_token_id=ends)
    play = Episodes(engine, from_class(config.path, {}, "tell", 99), layout, ends, config, limit)
    asked = [Prompt([3], "", {}, i, [{"role": "user", "content": word}]) for i, word in enumerate(("hm", "oh"))]
    samples = play.generate(asked, Sampling(4), n=2, seed=3)
    assert all(len(s.turns) >= 2 for s in samples)
    return samples


def parts_of(sample):
    return sample.segments or [Segment(sample.prompt.ids, 0, len(sample.ids))]


def read_as_sampled(model, tokenizer, samples):
    """The mask is on what the policy said, and training reads of it what sampling read."""
    for s in samples:
        said = [i for t in s.turns for i in range(t.begin, t.end)]
        assert [i for i, m in enumerate(s.mask) if m] == said
    parts, whole = SegmentRows(samples), tokens_of(samples)
    logp = parts.join(Policy(model, tokenizer).logp(parts.tokens(whole)).logp, whole.mask.shape[1])
    recorded = torch.tensor([x for s in samples for x, m in zip(s.logp, s.mask, strict=True) if m])
    torch.testing.assert_close(logp[whole.mask], recorded, atol=1e-4, rtol=0)


def test_tools_without_a_template_for_them_are_refused_or_told(worlds):
    tokenizer = tokenizer_of(CHATML)
    layout, ends = Layout(tokenizer, wrap_in_chat=True), template_ends(tokenizer)
    engine = Engine(tiny_model("llama", vocab=len(tokenizer)), tokenizer, eos_token_id=ends)
    tools = ToolEnvironment([f"{worlds}:add"])
    with pytest.raises(SteersmanError, match="shows no tool calls; set "):
        Episodes(engine, tools, layout, ends, EnvironmentConfig(tools=["x"]), 128)
    with pytest.raises(SteersmanError, match=r"plain text, without tools; set environment\.tell_tools"):
        Episodes(engine, tools, Layout(tokenizer), ends, EnvironmentConfig(tools=["x"]), 128)
    told = EnvironmentConfig(tools=["x"], tell_tools=True)
    plain = Episodes(engine, tools, Layout(tokenizer), ends, told, 4096)
    game = EpisodeInPlay(Prompt([3], "", {}, 0, ASK), 0, 0, 0, 0)
    plain.lay_out_opening(game, ASK, 4)
    assert '"name": "add"' in game.talk.prompt.text
    program = AgentEnvironment([sys.executable], pays=False, time_limit=1.0, longest=100)
    agent = Episodes(engine, program, Layout(tokenizer), ends, EnvironmentConfig(agent=["x"]), 4096)
    game = EpisodeInPlay(Prompt([3], "", {}, 0, ASK), 0, 0, 0, 0)
    agent.lay_out_opening(game, [{**ASK[0], "tools": tools.tools}], 4)
    assert '"name": "add"' in game.talk.prompt.text
    play = Episodes(engine, tools, layout, ends, told, 4096)
    game = EpisodeInPlay(Prompt([3], "", {}, 0, ASK), 0, 0, 0, 0)
    play.lay_out_opening(game, ASK, 4)
    assert '"name": "add"' in game.talk.prompt.text
    game.talk.add_reply(Sample(game.talk.prompt, [4, 5], [0.0, 0.0], "eos", "b"))
    game.reply = Reply("b", "b", (Call("add", {"a": 1, "b": 2}),))
    assert play.lay_out_answer(game, Answer([{"role": "tool", "name": "add", "content": "3"}]), 4)
    assert "user\n<tool<unk>response>" in tokenizer.decode(game.talk.ids)  # these letters have no _


@pytest.mark.parametrize(
    ("template", "first"),
    [(CHATML, ["system", "user"]), (GEMMA, ["user"]), (CHATML.replace("messages", "messages if m.role != 'system'"),
                                                       ["user"])],
)  # fmt: skip
def test_tools_are_told_in_the_users_turn_where_the_template_has_no_system_turn(template, first, worlds):
    tokenizer = tokenizer_of(template)
    engine = Engine(tiny_model("llama", vocab=len(tokenizer)), tokenizer, eos_token_id=template_ends(tokenizer))
    config = EnvironmentConfig(tools=["x"], tell_tools=True)
    tools = ToolEnvironment([f"{worlds}:add"])
    play = Episodes(engine, tools, Layout(tokenizer, wrap_in_chat=True), template_ends(tokenizer), config, 4096)
    game = EpisodeInPlay(Prompt([3], "", {}, 0, ASK), 0, 0, 0, 0)
    play.lay_out_opening(game, ASK, 4)
    assert [m["role"] for m in game.messages] == first
    assert game.messages[-1]["content"].endswith("hello")
    assert '"name": "add"' in game.talk.prompt.text
    assert ASK == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(("template", "rewrites"), [*zip(FIVE, (False, False, False, True, True), strict=True)])
def test_which_templates_rewrite(template, rewrites):
    assert (laid(FIVE[template]).rewriting(ASK, USER) is not None) == rewrites


@pytest.mark.parametrize(("template", "apart"), [(QWEN3, True), (LLAMA3, False)])
def test_a_dropped_thought_begins_a_segment(template, apart, worlds):
    tokenizer = tokenizer_of(template)
    layout, ends = Layout(tokenizer, wrap_in_chat=True), template_ends(tokenizer)
    engine = Engine(tiny_model("llama", vocab=len(tokenizer)), tokenizer, eos_token_id=ends)
    config = EnvironmentConfig(path=f"{worlds}:Echo", history="segments")
    play = Episodes(engine, from_class(config.path, {}, "tell", 99), layout, ends, config, 1024)
    game = EpisodeInPlay(Prompt([3], "", {}, 0, ASK), 0, 0, 0, 0)
    play.lay_out_opening(game, ASK, 4)
    text = "<think>\nzzz\n</think>\n\nyes"
    ids = [*layout.codec.more(text), tokenizer.convert_tokens_to_ids("<|im_end|>")]
    game.talk.add_reply(Sample(game.talk.prompt, ids, [0.0] * len(ids), "eos", text))
    game.reply = Reply(text, "yes")
    assert play.lay_out_answer(game, Answer(USER), 4)
    assert (len(game.earlier) == 1) == apart
    assert ("zzz" in tokenizer.decode(game.talk.context())) != apart


@pytest.mark.parametrize("kind", ["new conversation", "encoder-decoder"])
def test_a_conversation_that_the_template_refuses_leaves_the_episode_as_it_was(kind, worlds):
    """It counted what had been said twice."""
    tokenizer, pair = tokenizer_of(GEMMA), kind == "encoder-decoder"
    layout = PairLayout(tokenizer, start=1, wrap_in_chat=True) if pair else Layout(tokenizer, wrap_in_chat=True)
    model, ends = tiny_model("t5" if pair else "llama", vocab=len(tokenizer)), template_ends(tokenizer)
    config = EnvironmentConfig(path=f"{worlds}:Echo")
    play = Episodes(
        Engine(model, tokenizer, eos_token_id=ends),
        from_class(config.path, {}, "tell", 99),
        layout,
        ends,
        config,
        512,
    )
    game = EpisodeInPlay(Prompt([3], "", {}, 0, ASK), 0, 0, 0, 0)
    play.lay_out_opening(game, ASK, 4)
    talk = game.talk
    talk.add_reply(Sample(talk.prompt, [4, 5], [0.0, 0.0], "eos", "b"))
    game.reply, before = Reply("b", "b"), (game.messages, game.shown_first, game.replies_before)
    refused = Answer([{"role": "system", "content": "look"}, *USER], new_conversation=not pair)
    with pytest.raises(FaultError, match="roles must take turns"):
        play.lay_out_answer(game, refused, 4)
    assert game.talk is talk
    assert game.earlier == []
    assert game.turns == 1
    assert (game.messages, game.shown_first, game.replies_before) == before
    with pytest.raises(FaultError, match="a new conversation has no message"):
        play.lay_out_answer(game, Answer([], new_conversation=True), 4)
    assert game.turns == 1


def test_replies_of_earlier_conversations_are_counted_once(worlds):
    """A last reply without an answer was left out of what is kept for DPO and KTO."""
    tokenizer = tokenizer_of(CHATML)
    layout, ends = Layout(tokenizer, wrap_in_chat=True), template_ends(tokenizer)
    engine = Engine(tiny_model("llama", vocab=len(tokenizer)), tokenizer, eos_token_id=ends)
    config = EnvironmentConfig(path=f"{worlds}:Echo")
    play = Episodes(engine, from_class(config.path, {}, "tell", 99), layout, ends, config, 512)
    game = EpisodeInPlay(Prompt([3], "", {}, 0, ASK), 0, 0, 0, 0)
    play.lay_out_opening(game, ASK, 4)
    game.talk.add_reply(Sample(game.talk.prompt, [4, 5], [0.0, 0.0], "eos", "b"))
    game.reply = Reply("b", "b")
    assert play.lay_out_answer(game, Answer(USER, new_conversation=True), 4)
    assert (game.turns, game.replies_before) == (1, 1)
    game.talk.add_reply(Sample(game.talk.prompt, [6], [0.0], "eos", "c"))
    assert _as_messages(game, "c") == [{"role": "assistant", "content": "c"}]


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
    apart = parts.split(advantage.adv)
    assert apart[0, 0] == advantage.adv[0, 0] == 1.0  # said before the reward, in another segment
    assert apart[1, 1] == advantage.adv[0, 2] == 1.0
    assert parts.owner.tolist() == [0, 0, 1]
    assert parts.leads.tolist() == [True, False, True]
    assert parts.rows_of(torch.tensor([1, 0])).tolist() == [0, 1, 2]
    some = torch.tensor([1, 2])  # what stands elsewhere stays
    put = parts.put(-apart[some], read.mask[some], some, steps)
    assert put.tolist() == [[0.0, 1.0, -1.0], [1.0, 1.0, 5.0]]
