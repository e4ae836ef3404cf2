"""The real sets: every row is either used or left out by name, and the counts are those of their notes."""

import pytest

from steersman.data import (
    DataConfig,
    Layout,
    demonstrations,
    describe,
    encode,
    encode_prompts,
    feedback,
    preferences,
    prompts,
    rankings,
    ratings,
)
from steersman.types import SteersmanError

NLG = {
    "columns": {"prompt": "mr", "completion": "sys_ref"},
    "scores": ["informativeness", "naturalness", "quality"],
    "score_range": (1, 6),
}
SETS = [
    (preferences, "hh_rlhf", {"on_bad_row": "skip"}, 1828,
     {"transcripts differ before the last reply": 4, "empty completion": 2}),
    (preferences, "ukp_convarg1/strict_pairs", {}, 9205, {}),
    (rankings, "ukp_convarg1/ranking", {"ties": "keep"}, 26, {"answer given twice": 10}),
    (preferences, "instruction_preference", {"on_bad_row": "skip"}, 900, {"chosen equals rejected": 6}),
    (demonstrations, "instruction_preference", {}, 906, {}),
    (prompts, "instruction_preference", {}, 906, {}),
    (preferences, "llamafactory_demo/dpo_en_demo.part1.json", {}, 251, {}),
    (feedback, "llamafactory_demo/kto_en_demo.part1.json", {}, 244, {}),
    (demonstrations, "gsm8k", {}, 7473, {}),
    (prompts, "gsm8k", {"prompt_template": "Question: {question}\nAnswer:"}, 7473, {}),
    (prompts, "svamp", {"prompt_template": "{Body}. {Question}"}, 800, {}),
    (prompts, "ifeval", {}, 541, {}),
    (prompts, "bbh", {}, 2000, {}),
    (demonstrations, "tinystories", {}, 2200, {}),
    (prompts, "tinystories", {"opening_words": 8}, 2200, {}),
    (rankings, "oasst_trees", {}, 172, {}),
    (preferences, "oasst_trees", {}, 597, {}),
    (feedback, "taskmaster_reward", {"on_bad_row": "skip"}, 1998, {"empty completion": 2}),
    (ratings, "nlg_human_ratings", NLG, 2051, {}),
    (ratings, "vader_sentiment/movieReviewSnippets_GroundTruth.part1.txt", {}, 8826, {}),
    (demonstrations, "ntrex/newstest2019-src.eng.txt", {}, 1997, {}),
]  # fmt: skip


@pytest.mark.parametrize(("fn", "folder", "given", "count", "left_out"), SETS)
def test_counts(shared, fn, folder, given, count, left_out):
    loaded = fn(DataConfig(path=str(shared / folder), **given))
    assert len(loaded.train) == count
    assert loaded.left_out.counts == left_out


def test_bad_rows_of_real_sets_stop_by_name(shared):
    with pytest.raises(SteersmanError, match=r"part1.jsonl, line 70, field 'chosen': the answer is empty"):
        preferences(DataConfig(path=str(shared / "hh_rlhf")))
    with pytest.raises(SteersmanError, match=r"row 123, field 'chosen': the chosen answer equals"):
        preferences(DataConfig(path=str(shared / "instruction_preference")))


def test_votes_and_ties(shared):
    given = {"path": str(shared / "pandalm_human"), "on_bad_row": "skip"}
    kept = preferences(DataConfig(ties="keep", **given))
    dropped = preferences(DataConfig(ties="drop", **given))
    assert kept.left_out.counts == {"empty completion": 26, "wrong type": 6}
    assert len(kept.train) == 720
    assert len(kept.train) - len(dropped.train) == dropped.left_out.counts["tie"] > 20
    assert {round(e.agreement, 3) for e in dropped.train} <= {0.667, 0.833, 1.0}


def test_whole_debates_are_held_out(shared):
    config = DataConfig(path=str(shared / "ukp_convarg1/strict_pairs"), held_out_files=["is-porn*", "christ*"])
    loaded = preferences(config)
    assert len(loaded.train) + len(loaded.held_out) == 9205
    assert {e.prompt for e in loaded.held_out} == {
        "is porn wrong: no is is not",
        "is porn wrong: yes porn is wrong",
        "christianity or atheism: atheism",
        "christianity or atheism: christianity",
    }


def test_stories_with_their_own_tokenizer(shared, stories):
    config = DataConfig(path=str(shared / "tinystories"), limit=60, max_length=512, on_too_long="drop")
    laid = Layout(stories)
    loaded = demonstrations(config)
    made = encode(loaded.train, laid, config)
    assert made.dropped + len(made.groups) == 60
    for example, e in zip(made.examples, made.first, strict=True):
        assert e.prompt == [stories.bos_token_id]
        assert e.response[-1] == stories.eos_token_id
        assert e.prompt + e.response[:-1] == stories(example.completion).input_ids
    assert describe(loaded, made, laid).end_share == 1
    openings, _, _ = encode_prompts(prompts(config.model_copy(update={"opening_words": 6})).train, laid, config)
    assert all(stories.decode(p.ids, skip_special_tokens=True) == p.text for p in openings)


def test_pairs_end_to_end(shared, stories, chatml):
    for folder, tokenizer in (("llamafactory_demo/dpo*", chatml), ("hh_rlhf", stories), ("hh_rlhf", chatml)):
        config = DataConfig(path=str(shared / folder), on_bad_row="skip", limit=60)
        laid = Layout(tokenizer)
        loaded = preferences(config)
        made = encode(loaded.train, laid, config)
        for example, (chosen, rejected) in zip(made.examples, made.groups, strict=True):
            assert chosen.prompt == rejected.prompt == laid.prompt(example.prompt)[0]
            assert all(chosen.mask)
            assert laid.codec.decode(chosen.response).strip() == example.chosen[0]["content"].strip()
        assert describe(loaded, made, laid).end_share == 1
