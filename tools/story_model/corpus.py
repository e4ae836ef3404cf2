"""Make the training corpus and the tokenizer of the story model.

    python tools/story_model/corpus.py --data ../shared/data --broad runs/story-model/broad.jsonl \
        --simple runs/story-model/simple.jsonl --out runs/story-model

Writes train.jsonl (real stories twice, those sampled at the higher temperature once), finish.jsonl (real stories
and those sampled at the lower one), held_out.jsonl, and tokenizer/ (byte-level BPE learned on the real training
stories; a space belongs to the word after it).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from stories import first_sentence, real_stories, words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
CONTEXT = 512


def choose(rows: list[dict], vocabulary: Counter[str], repeats: int) -> list[str]:
    """Finished stories of usual length and spelling that do not loop, `repeats` at most with one first sentence."""
    kept: dict[str, None] = {}
    openings: Counter[str] = Counter()
    for row in rows:
        text = "\n".join(line.strip() for line in row["text"].split("\n") if line.strip())
        opening = first_sentence(text)
        ok = row["finished"] and 300 <= len(text) <= 1200 and text.isascii() and text[-1:] in '.!?"'
        ok = ok and text.count('"') % 2 == 0 and openings[opening] < repeats
        if ok and all(vocabulary[w.lower()] for w in words(text)) and not loops(text):
            kept[text] = None
            openings[opening] += 1
    return list(kept)


def loops(text: str) -> bool:
    """Whether a run of four words comes back so often that the text goes round in circles."""
    found = words(text.lower())
    fours = Counter(zip(found, found[1:], found[2:], found[3:], strict=False))
    return sum(n - 1 for n in fours.values()) > 0.06 * len(found)


def learn_tokenizer(stories: list[str], size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    print(f"{path}: {len(texts)} stories, {sum(map(len, texts)) / 1e6:.2f} M characters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with tinystories/")
    parser.add_argument("--broad", type=Path, required=True, help="what sample.py wrote at temperature 0.8")
    parser.add_argument("--simple", type=Path, required=True, help="what sample.py wrote at temperature 0.7")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=4096)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    train, held_out = real_stories(args.data)
    known = Counter(w.lower() for s in train for w in words(s))
    broad, simple = choose(read(args.broad), known, 12), choose(read(args.simple), known, 100)
    write(args.out / "train.jsonl", train * 2 + broad)
    write(args.out / "finish.jsonl", train + simple)
    write(args.out / "held_out.jsonl", held_out)

    tokenizer = learn_tokenizer(train, args.vocabulary)
    tokenizer.save_pretrained(args.out / "tokenizer")
    for text in held_out + broad + simple:
        assert tokenizer.decode(tokenizer(text, verbose=False)["input_ids"], skip_special_tokens=True) == text, text
    ids = sum(len(tokenizer(t, verbose=False)["input_ids"]) for t in held_out)
    print(f"tokenizer: {len(tokenizer)} tokens, {sum(map(len, held_out)) / ids:.2f} characters per token held out")


if __name__ == "__main__":
    main()
