"""Sample stories from the pretrained stories260k model, to train on next to the real ones.

    python tools/story_model/sample.py --data ../shared/data --out runs/story-model/broad.jsonl \
        --starts sentences --temperature 0.8 --count 3840
    python tools/story_model/sample.py --data ../shared/data --out runs/story-model/simple.jsonl \
        --starts words --temperature 0.7 --count 3840

Many stories start with words of a real training story, which brings in names, animals and things that the model
would seldom start with by itself: with `sentences` every second one has a whole first sentence, with `words`
three in four have its first few words. The held-out stories lend nothing. A temperature below 1 makes simpler and
more fluent text than the real stories are. Rows are {"text": ..., "finished": ...}; `corpus.py` chooses among them.
Same seed, same stories, whatever --count is (a longer run only adds).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from stories import first_sentence, real_stories
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman.rollout import Engine, Sampling
from steersman.types import Prompt

STORY = 1  # the id that starts a story, and that the model writes where one ends
CONTEXT = 512
CHUNK = 256


def opening(sentences: list[str], starts: str, seed: int, index: int) -> str:
    """What story `index` starts with; "" for nothing."""
    if starts == "sentences":
        return sentences[index // 2 % len(sentences)] if index % 2 else ""
    if index % 4 == 0:
        return ""
    draw = random.Random(f"{seed} {index}")
    given = draw.choice(sentences).split(" ")
    return " ".join(given[: draw.randint(min(3, len(given)), len(given))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with tinystories/ and stories260k/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--starts", choices=("sentences", "words"), default="words")
    parser.add_argument("--count", type=int, default=4096)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    folder = args.data / "stories260k" / "hf"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = Engine(model, tokenizer, max_batch=64, eos_token_id=STORY)
    openings = [s for s in map(first_sentence, real_stories(args.data)[0]) if 20 <= len(s) <= 120]

    args.out.parent.mkdir(parents=True, exist_ok=True)
    began, tokens = time.perf_counter(), 0
    with args.out.open("w", encoding="utf-8") as out:
        for start in range(0, args.count, CHUNK):
            prompts = []
            for index in range(start, start + CHUNK):
                text = opening(openings, args.starts, args.seed, index)
                ids = tokenizer.encode(text) if text else [STORY]
                prompts.append(Prompt(ids=ids, text=text, index=index))
            room = CONTEXT - max(len(p.ids) for p in prompts)
            sampling = Sampling(max_new_tokens=room, temperature=args.temperature, top_p=args.top_p)
            for sample in engine.generate(prompts, sampling, seed=args.seed):
                ids = [*sample.prompt.ids, *sample.ids]
                story = tokenizer.decode(ids, skip_special_tokens=True).strip()
                out.write(json.dumps({"text": story, "finished": sample.terminated}) + "\n")
                tokens += len(sample.ids)
            out.flush()
            seconds = time.perf_counter() - began
            print(f"{start + CHUNK} stories, {tokens} tokens, {tokens / seconds:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
