import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steersman.data import Codec, DataConfig, Encoded, Layout, Query, Row, encode, encode_prompts
from steersman.data.encode import smallest
from steersman.data.examples import Demonstration, Preference
from steersman.types import SteersmanError

TEXTS = [
    ("Once upon a time", ", there was a girl."),
    ("Once upon a time", " there was a girl."),
    ("User: two?\nAssistant:", " five"),
    ("He said\n", "\n\n  indented, then\nmore "),
    (" leading space", "x"),
    ("trailing space ", "word"),
    ("Ünïcödé 日本", "語 🙂 ok"),
    ("a", "\t1234"),
]
SAFE = st.text(alphabet="ab Lily.,\n?5é日", min_size=1, max_size=30)


def row() -> Row:
    return Row({}, "made.jsonl", 7, "line")


@pytest.mark.parametrize(("prompt", "completion"), TEXTS)
def test_joined_ids_decode_to_the_text_itself(tokenizer, prompt, completion):
    p, r, mask = Layout(tokenizer).answer(prompt, completion)
    assert tokenizer.decode(p + r, skip_special_tokens=True) == prompt + completion
    assert mask == [True] * len(r)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SAFE, SAFE)
def test_joined_ids_decode_to_any_text(tokenizer, prompt, completion):
    p, r, _ = Layout(tokenizer).answer(prompt, completion)
    assert tokenizer.decode(p + r, skip_special_tokens=True) == prompt + completion
    assert Layout(tokenizer).codec.decode(r) == completion


@pytest.mark.parametrize(("prompt", "completion"), TEXTS)
def test_training_prompt_is_the_rollout_prompt(tokenizer, prompt, completion):
    laid = Layout(tokenizer)
    assert laid.answer(prompt, completion)[0] == laid.prompt(prompt)[0]


def test_prompt_of_a_rollout_is_what_the_tokenizer_itself_gives(spaced, gpt2like):
    for tokenizer in (spaced, gpt2like):
        text = "Once upon a time"
        assert Layout(tokenizer).prompt(text) == (tokenizer(text).input_ids, text)


def test_bos_once_and_eos_once(bos_and_eos):
    bos, eos = bos_and_eos.bos_token_id, bos_and_eos.eos_token_id
    laid = Layout(bos_and_eos)
    for prompt, completion in [("Once", " upon"), ("<s>Once", " upon</s>"), ("Once", " upon</s>")]:
        p, r, _ = laid.answer(prompt, completion)
        ids = p + r
        assert (ids[0], ids[-1], ids.count(bos), ids.count(eos)) == (bos, eos, 1, 1)
        assert bos_and_eos.decode(ids, skip_special_tokens=True) == "Once upon"


def test_end_token_counts_and_can_be_left_out(gpt2like):
    p, r, mask = Layout(gpt2like).answer("a", "b")
    assert r[-1] == gpt2like.eos_token_id
    assert mask[-1]
    assert Layout(gpt2like, append_eos=False).answer("a", "b") == (p, r[:-1], mask[:-1])


def test_text_alone_gives_its_first_token_to_the_prompt(tokenizer):
    laid = Layout(tokenizer)
    whole = "Once upon a time, there was a girl."
    p, r, mask = laid.answer("", whole)
    assert p + r == [*laid.codec.begin(whole), tokenizer.eos_token_id]
    assert len(p) == 1
    assert all(mask)


def test_special_tokens_in_the_data_are_ordinary_text(tokenizer):
    name, eos = tokenizer.eos_token, tokenizer.eos_token_id
    laid = Layout(tokenizer)
    p, r, _ = laid.answer(f"a {name} b", f" c {name} d")
    assert p.count(eos) == 0
    assert r.count(eos) == 1
    assert tokenizer.decode((p + r)[len(laid.codec.prefix) : -1]) == f"a {name} b c {name} d"
    allowed = Layout(tokenizer, allow_special_tokens=True).answer(f"a {name} b", " c")
    assert allowed[0].count(eos) == 1


def test_no_end_token_is_refused(gpt2like):
    import copy

    bare = copy.deepcopy(gpt2like)
    bare.eos_token = None
    with pytest.raises(SteersmanError, match="no end token"):
        Layout(bare).answer("a", "b")
    assert Layout(bare, append_eos=False).answer("a", "b")[1]


def config(**given) -> DataConfig:
    return DataConfig(path="unused", **given)


def test_too_long_is_refused_dropped_or_cut(bos_and_eos):
    laid = Layout(bos_and_eos)
    long = Demonstration("x " * 40, " yes", row())
    short = Demonstration("x", " no", row())
    with pytest.raises(SteersmanError, match=r"made.jsonl, line 7.*prompt tokens.*on_too_long"):
        encode([short, long], laid, config(max_length=20))
    with pytest.raises(SteersmanError, match="exceed"):
        encode([short, long], laid, config(), context=20)
    dropped = encode([short, long], laid, config(max_length=20, on_too_long="drop"))
    assert (dropped.dropped, len(dropped.groups), dropped.examples) == (1, 1, [short])
    cut = encode([short, long], laid, config(max_length=20, on_too_long="truncate"))
    whole = encode([long], laid, config()).first[0]
    e = cut.first[1]
    assert (cut.cut, len(e)) == (1, 20)
    assert e.prompt[0] == bos_and_eos.bos_token_id
    assert e.prompt[1:] == whole.prompt[len(whole.prompt) - len(e.prompt) + 1 :]
    assert e.response == whole.response


def test_long_answers_are_cut_on_the_right_and_keep_a_prompt(bos_and_eos):
    laid = Layout(bos_and_eos)
    e = encode([Demonstration("x x", " y" * 60, row())], laid, config(max_length=16, on_too_long="truncate")).first[0]
    assert len(e) == 16
    assert len(e.prompt) == 2
    assert bos_and_eos.eos_token_id not in e.response


def test_a_pair_keeps_one_prompt_when_cut(bos_and_eos):
    pair = Preference("x " * 30, " good answer", " bad", row())
    (chosen, rejected) = encode([pair], Layout(bos_and_eos), config(max_length=24, on_too_long="truncate")).groups[0]
    assert chosen.prompt == rejected.prompt
    assert len(chosen) == 24
    assert len(rejected) < 24


def test_prompts_leave_room_for_the_answer(bos_and_eos):
    laid = Layout(bos_and_eos)
    queries = [Query("x", row(), {"answer": 3}), Query("word " * 30, row()), Query("y", row())]
    with pytest.raises(SteersmanError, match=r"line 7: the prompt has \d+ tokens, at most 12 fit"):
        encode_prompts(queries, laid, config(), context=20, new_tokens=8)
    made, dropped, cut = encode_prompts(queries, laid, config(on_too_long="drop"), context=20, new_tokens=8)
    assert ([p.index for p in made], dropped, cut) == ([0, 2], 1, 0)
    assert made[0].row == {"answer": 3}
    made, _, cut = encode_prompts(queries, laid, config(on_too_long="truncate", max_prompt_tokens=9))
    assert (len(made[1].ids), cut, made[1].ids[0]) == (9, 1, bos_and_eos.bos_token_id)
    assert made[1].text == bos_and_eos.decode(made[1].ids, skip_special_tokens=True)
    with pytest.raises(SteersmanError, match="leave no room"):
        encode_prompts(queries, laid, config(), context=8, new_tokens=8)
    with pytest.raises(SteersmanError, match="no prompt fits"):
        encode_prompts(queries[1:2], laid, config(on_too_long="drop", max_prompt_tokens=3))


def test_codec_knows_what_the_tokenizer_puts_around(bos_and_eos, gpt2like, spaced):
    assert (Codec(bos_and_eos).prefix, Codec(bos_and_eos).suffix) == (
        [bos_and_eos.bos_token_id],
        [bos_and_eos.eos_token_id],
    )
    assert (Codec(gpt2like).prefix, Codec(gpt2like).spaced) == ([], False)
    assert (Codec(spaced).prefix, Codec(spaced).spaced) == ([1], True)


def test_length_counts_prompt_and_response():
    assert len(Encoded([1, 2], [3], [True])) == 3
    assert smallest(None, 3, 2) == 2
    assert smallest(None) is None
