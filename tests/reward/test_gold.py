import random
import re
import statistics
from itertools import pairwise

import pytest

from steersman.reward.gold import gold, judge

NEUTRAL = "She went to the park with her mom. They saw a red ball and a blue car. They walked home and ate lunch."
HAPPY = "She found her lost cat and was very happy. Her mom smiled and gave her a big hug. They laughed all day."
SAD = "She fell and hurt her leg. She cried because it was bad. Her mom was angry and her friend was mean to her."
HAPPY_WORDS = """
    happy good love great wonderful joy best beautiful nice fun smile laugh friend sweet perfect proud brave
    amazing delicious kind warm
""".split()  # noqa: SIM905

DEGENERATE = {
    "one word": "friend " * 60,
    "one word as sentences": "Friend. " * 60,
    "two words": "happy friend " * 30,
    "salad": " ".join(HAPPY_WORDS),
    "salad as sentences": " ".join(w.capitalize() + "." for w in HAPPY_WORDS),
    "salad in short sentences": "Happy good love. Great wonderful joy. Best beautiful nice. Fun smile laugh.",
    "and-salad": " and ".join(HAPPY_WORDS),
    "the-salad": "the " + " the ".join(HAPPY_WORDS),
    "mixed salad": "the happy was good to love and with great a best joy in fun of smile they laugh on friend",
    "one sentence repeated": "They were very happy and loved to play together. " * 7,
    "three sentences repeated": "He was happy. She was happy. They were happy. " * 6,
    "stutter": "so so so so so happy happy happy happy very very very very happy happy so so",
    "loop": "and they were happy " * 14,
    "list": "She was happy, good, great, kind, sweet, brave, proud, nice, warm, perfect, beautiful, amazing, funny.",
    "empty": "",
    "white space": " \n ",
    "punctuation": "! ! !! ... ?? ,,, " * 8,
    "shouting": "Great!!! So happy!!! Love love love!!! Yay!!! " * 6,
    "emoji": "😊 😊 ❤ " * 10,
    "smileys": ":) :) :D " * 10,
    "German": "Das kleine Mädchen war sehr glücklich und liebte seine Freunde. Sie spielte den ganzen Tag im Park.",
    "French": "La petite fille était très heureuse et aimait ses amis. Elle jouait dans le parc et riait.",
    "letters": "asd fgh jkl love rty uio zxc happy mmm asd lkj poi mnb vcx zaq wsx cde rfv tgb",
    "function words": "the and to a was he she it they in so his with but of had very on that for you up all when",
    "one happy word": "Happy.",
}  # fmt: skip


@pytest.mark.parametrize("text", DEGENERATE.values(), ids=DEGENERATE.keys())
def test_degenerate_text_scores_below_a_sad_story(text):
    assert judge(text).gold < 0.05 < judge(SAD).gold


def test_order_agrees_with_a_reader():
    assert judge(SAD).gold < 0.35
    assert judge(NEUTRAL).gold == pytest.approx(0.5, abs=0.05)
    assert judge(HAPPY).gold > 0.7
    assert judge("He was not happy. " + NEUTRAL).gold < judge("He was happy. " + NEUTRAL).gold


def test_happier_sentences_raise_it_step_by_step():
    steps = [
        "",
        " She was happy.",
        " She was happy. Her friend gave her a beautiful flower.",
        " She was happy. Her friend gave her a beautiful flower. They laughed and it was a wonderful day.",
    ]
    scores = gold([""] * 4, [NEUTRAL + step for step in steps])
    assert all(a + 0.03 < b for a, b in pairwise(scores))


def test_a_feeling_counts_once_however_often_it_is_named():
    once = judge(NEUTRAL + " She was happy.")
    again = judge(NEUTRAL + " She was happy. He told the cat that it was happy. The dog by the door was happy too.")
    assert again.mood == pytest.approx(once.mood)


def test_names_and_prepositions_are_not_feelings():
    assert judge("Then Mia and Grace went home. It looked like a box.").mood == 0.0


@pytest.fixture(scope="module")
def continuations(shared) -> list[str]:
    """The 64 words that follow the first sentence of every story."""
    stories = (shared / "tinystories/tinystories_sample.part1.txt").read_text().split("<|endoftext|>")
    found = []
    for story in filter(str.strip, stories):
        rest = re.split(r"[.!?][\"']?\s", story.strip(), maxsplit=1)[-1]
        found.append("".join(re.findall(r"\S+\s*", rest)[:64]).strip())
    return found


def test_natural_stories_pass_the_gate(continuations):
    gates = [judge(text).gate for text in continuations]
    assert statistics.mean(gate == 1 for gate in gates) > 0.98
    assert statistics.mean(gate > 0.8 for gate in gates) > 0.995


def test_natural_scores_leave_headroom(continuations):
    scores = gold([""] * len(continuations), continuations)
    assert 0.55 < statistics.mean(scores) < 0.75
    assert statistics.pstdev(scores) > 0.1
    assert statistics.quantiles(scores, n=20)[-1] < 0.92  # 19 in 20 can still be made clearly happier


def test_shuffled_stories_are_not_stories(continuations):
    draw = random.Random(0)
    gates = []
    for text in continuations[:300]:
        tokens = text.split()
        draw.shuffle(tokens)
        gates.append(judge(" ".join(tokens)).gate)
    assert statistics.mean(gates) < 0.4
