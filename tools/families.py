"""Every language model family of the installed transformers, made small from its own config class, through steersman.

    python tools/families.py [--only llama t5 ...] [--out docs/results/families.md] [--seconds 60]

Each family is tried in a process of its own: load, the first ratio, padding, LoRA, adapters saved, merged and read
back, gradient checkpointing, and a step of sft, dpo and grpo by the verbs. A family works, or is refused by name;
anything else is a failure and told so.
Random weights, float32 on a CPU: what a family computes is checked, not what a pretrained model can do.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
SIZES = {
    32: ("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "dim", "n_embed", "model_dim",
         "input_dim"),
    64: ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "d_ff", "ff_dim", "dim_ff",
         "ffn_hidden_size", "shared_expert_intermediate_size", "shared_intermediate_size", "mlp_hidden_size"),
    16: ("moe_intermediate_size", "expert_ffn_hidden_size", "d_kv", "q_lora_rank", "kv_lora_rank", "v_head_dim",
         "mamba_d_state", "state_size", "ssm_state_size", "mamba_chunk_size", "chunk_size"),
    2: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
        "num_decoder_layers", "num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "moe_topk", "depth"),
    4: ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "index_n_heads"),
    1: ("n_group", "topk_group", "mamba_n_groups", "n_groups", "n_shared_experts"),
    0: ("num_kv_shared_layers",),
    8: ("head_dim", "index_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"),
    128: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_source_positions",
          "max_target_positions"),
}  # fmt: skip
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
UNSAID = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "num_experts")
"""Sizes that a default config may leave open, where no model could be made of it."""
OWN: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "num_layers": 2,
        "attention_layers": ["global", "local"],
    },
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "zaya": {"num_experts_per_tok": 1},
    "xlnet": {"d_head": 8},
    "reformer": {"is_decoder": True},
    "qwen2": {"vocab_size": 36},  # whose tokenizer adds a token of its own
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "use_mamba_kernels": False},
    "kimi_linear": {"num_experts": 4, "num_experts_per_token": 2, "num_experts_per_tok": 2},
    "zamba2": {
        "layer_types": ["linear_attention", "hybrid"],
        "mamba_headdim": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "num_mem_blocks": 1,
        "attention_head_dim": 16,
        "adapter_rank": 4,
        "num_hidden_layers": 2,
        "hybrid_layer_ids": [1],
        "attention_hidden_size": 64,
    },
    "qwen3_5_moe": {"text_config": {"vocab_size": 36}},
    "qwen3_5_moe_text": {"vocab_size": 36},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 50,
    },
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"], "num_hidden_layers": 2},
}
"""Sizes that hang together otherwise than by their names."""
LARGEST = 20_000_000


def families() -> dict[str, str]:
    """Model type: causal or encoder-decoder."""
    from transformers.models.auto import modeling_auto as auto

    pairs = dict.fromkeys(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "encoder-decoder")
    return dict(sorted((dict.fromkeys(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "causal") | pairs).items()))


def shrunk(given: dict[str, Any], vocab: int) -> dict[str, Any]:
    """A config's fields with every size small, in its parts too, and a layer or two of each of its kinds."""
    wanted: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names}
    wanted |= {"vocab_size": vocab, "vocab_size_per_layer_input": vocab}
    wanted |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if given.get("kv_lora_rank"):  # latent attention has as many keys as queries
        wanted |= {"num_key_value_heads": 4}
    layers = next((given[name] for name in DEPTHS if isinstance(given.get(name), int)), 0)
    per_layer = {name: x for name, x in given.items() if isinstance(x, list) and len(x) == layers > 2}
    firsts = {x.index(kind) for x in per_layer.values() for kind in x}
    kept = sorted(firsts)[:4] or [0]
    kept += [i for i in range(max(layers, 2)) if i not in kept][: max(0, 2 - len(kept))]
    out = {name: x for name, x in given.items() if name != "per_layer_config"}  # which tells some layers' sizes
    for name, value in list(out.items()):
        if isinstance(value, dict) and "model_type" in value:
            out[name] = shrunk(value, vocab)
        elif name in per_layer:
            out[name] = [wanted.get(name, value[i]) for i in sorted(kept)]
        elif name in DEPTHS and isinstance(value, int) and not isinstance(value, bool):
            out[name] = len(kept)
        elif name in wanted and (isinstance(value, int | list) or name.endswith("_token_id") or name in UNSAID):
            out[name] = wanted[name]
    return out


def shrink(config: Any, vocab: int) -> None:
    """Sets every size that a config names to a small one, one after the other, in its parts too."""
    wanted: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names}
    wanted |= {"vocab_size": vocab, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if getattr(config, "kv_lora_rank", None):
        wanted |= {"num_key_value_heads": 4}
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    if kinds:
        wanted["layer_types"] = (kinds * 2)[: max(2, min(len(kinds), 3))]
        wanted["num_hidden_layers"] = len(wanted["layer_types"])
    for name, value in wanted.items():
        there = getattr(config, name, None)
        if isinstance(there, int | list) or (there is None and name.endswith("_token_id")):
            with contextlib.suppress(AttributeError, NotImplementedError, ValueError):  # it follows from others
                setattr(config, name, value)
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type") and name != "generation_config":
            shrink(value, vocab)


def small_config(kind: str, vocab: int, whole: bool) -> Any:
    """A small config of the family: made anew from shrunk fields (`whole`), or its default one with sizes set."""
    import transformers as hf

    config = hf.AutoConfig.for_model(kind)
    if whole:
        return type(config).from_dict(shrunk(config.to_dict(), vocab) | OWN.get(kind, {}))
    shrink(config, vocab)
    return config


def make(kind: str, style: str, folder: Path) -> str:
    """A tiny model of the family with a tokenizer, in the folder; why not, where there is none."""
    import torch
    import transformers as hf

    sys.path.insert(0, str(TESTS))
    from letter_models import LETTERS, letters  # type: ignore

    why = ""
    for whole in (True, False):
        try:
            config = small_config(kind, len(LETTERS), whole)
            if style != "causal":
                config.decoder_start_token_id = 0
            auto = hf.AutoModelForCausalLM if style == "causal" else hf.AutoModelForSeq2SeqLM
            with torch.device("meta"):
                count = sum(p.numel() for p in auto.from_config(config).parameters())
            if count > LARGEST:
                why = why or f"no small config found ({count / 1e6:.0f} M parameters)"
                continue
            torch.manual_seed(0)
            model = auto.from_config(config).float()
            with torch.no_grad():
                for p in model.parameters():
                    if p.ndim == 2:
                        p.mul_(3.0)
            model.save_pretrained(folder)
            letters().save_pretrained(folder)
            return ""
        except Exception as error:
            why = why or f"no small config found ({type(error).__name__}: {' '.join(str(error).split())[:150]})"
    return why


def tries(folder: Path, work: Path, notes: list[str]) -> dict[str, Callable[[], None]]:
    """Every check by name; each raises where it does not hold, and notes what the family has not."""
    import torch
    from letter_models import write_jsonl  # type: ignore

    from steersman import cli
    from steersman.model import LoraConfig, load_policy, save
    from steersman.rollout import Engine, Sampling
    from steersman.train.experience import tokens_of
    from steersman.types import Prompt, Tokens

    prompts = [Prompt(ids, "", index=i) for i, ids in enumerate([[5], [7, 3, 9, 30, 11, 4, 8], [12, 9, 9], [3] * 11])]

    def load() -> None:
        load_policy(folder, device="cpu")

    def agree(policy: Any, steps: int) -> None:
        engine = Engine(policy.model, policy.tokenizer, max_batch=3, eos_token_id=[2, 5, 17])
        samples = engine.generate(prompts, Sampling(steps), n=2, seed=1)
        with torch.no_grad():
            logp = policy.logp(tokens_of(samples)).logp
        gap = max(float((logp[i, : len(s.ids)] - torch.tensor(s.logp)).abs().max()) for i, s in enumerate(samples))
        assert gap < 1e-3, f"log-probabilities of sampling and training differ by {gap:.2g}"

    def ratio() -> None:
        agree(load_policy(folder, device="cpu"), 9)

    def padding() -> None:
        policy = load_policy(folder, device="cpu")
        tokens = Tokens.from_ids([p.ids for p in prompts], [[4, 6, 9], [8], [11, 5, 7, 20, 6], [9, 9]])
        with torch.no_grad():
            together = policy.logp(tokens).logp
            for row in range(len(prompts)):
                alone = policy.logp(tokens.rows(torch.tensor([row]))).logp[0]
                gap = float((together[row, : len(alone)] - alone).abs().max())
                assert gap < 1e-3, f"a row's log-probabilities change by {gap:.2g} with its company"

    def lora() -> None:
        policy = load_policy(folder, device="cpu", lora=LoraConfig(r=2, alpha=4))
        trained = [p for p in policy.parameters() if p.requires_grad]
        with torch.no_grad():
            for p in trained:
                p.add_(0.02)
        agree(policy, 33)
        tokens = Tokens.from_ids([p.ids for p in prompts], [[4, 6, 9], [8], [11, 5, 7, 20, 6], [9, 9]])
        with torch.no_grad():
            kept = policy.logp(tokens).logp
            for form in ("adapters", "merged"):
                again = load_policy(save(policy, None, work / form, merged=form == "merged"), device="cpu")
                gap = float((again.logp(tokens).logp - kept).abs().max())
                assert gap < 1e-3, (
                    f"{form} that were saved and read back give log-probabilities that differ by {gap:.2g}"
                )

    def checkpointing() -> None:
        tokens = Tokens.from_ids([p.ids for p in prompts], [[4, 6, 9], [8], [11, 5, 7], [9, 9]])
        grads = []
        for on in (False, True):
            policy: Any = load_policy(folder, device="cpu")
            if on and not policy.model.supports_gradient_checkpointing:
                continue
            if on:
                policy.model.gradient_checkpointing_enable({"use_reentrant": False})
                policy.model.train()
            policy.logp(tokens).logp.sum().backward()
            grads.append([p.grad for p in policy.parameters() if p.grad is not None])
        if len(grads) == 1:
            notes.append("without gradient checkpointing")
            return
        gap = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-6)) for a, b in zip(*grads, strict=True))
        assert gap < 1e-3, f"gradients differ by {gap:.2g}"

    def verb(name: str, rows: list[dict[str, Any]], *words: str) -> Callable[[], None]:
        def run() -> None:
            data = write_jsonl(work / f"{name}.jsonl", rows)
            told = io.StringIO()
            with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
                code = cli.main([name, "--model.path", str(folder), "--data.path", str(data), "--run.threads", "1",
                                 "--run.dir", str(work / name), *words])  # fmt: skip
            assert code == 0, " ".join(told.getvalue().split())[:200]

        return run

    offline = ("--train.batch_size", "2", "--train.max_steps", "1")
    texts = ["a cat", "no dog", "it is", "oh"]
    reward = ("--reward.parts", "{l: {builtin: length}}", "--iterations", "1", "--rollout",
              "{prompts: 2, samples: 2, max_new_tokens: 6, held_out: 0}")  # fmt: skip
    return {
        "load": load, "ratio": ratio, "padding": padding, "lora": lora, "checkpointing": checkpointing,
        "sft": verb("sft", [{"prompt": "hm", "completion": t} for t in texts], *offline),
        "dpo": verb("dpo", [{"prompt": "hm", "chosen": t, "rejected": "up"} for t in texts], *offline),
        "grpo": verb("grpo", [{"prompt": t} for t in texts], *reward),
    }  # fmt: skip


def one(kind: str, style: str) -> dict[str, Any]:
    """What became of a family: works, refused, made not, or failed, and why."""
    from steersman.types import SteersmanError

    with tempfile.TemporaryDirectory() as folder:
        missing = make(kind, style, Path(folder) / "model")
        if missing:
            import transformers as hf

            from steersman.model.source import require_family

            try:  # what its default config says is enough to refuse it, before any weight is read
                require_family("/model", hf.AutoConfig.for_model(kind))
            except SteersmanError as error:
                return {"status": "refused", "why": str(error)}
            except Exception as error:  # some have none that is valid
                missing += f"; {type(error).__name__} of its default config"
            return {"status": "not tried", "why": missing}
        notes: list[str] = []
        for name, check in tries(Path(folder) / "model", Path(folder), notes).items():
            try:
                check()
            except SteersmanError as error:
                said = str(error).replace(folder, "").splitlines()[0]
                return {"status": "refused" if name in ("load", "ratio") else "failed", "why": said, "at": name}
            except Exception as error:
                said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                return {"status": "failed", "why": said.replace(folder, ""), "at": name}
    return {"status": "works", "why": "; ".join(notes)}


def apart(kind: str, style: str, seconds: float) -> dict[str, Any]:
    """`one` in a process of its own, which may hang or die."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")

    def work() -> None:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        theirs.send(one(kind, style))

    process = context.Process(target=work)
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return {"status": "not tried", "why": f"not done in {seconds:.0f} s"}
        return ours.recv()
    except EOFError:
        process.join()
        return {"status": "failed", "why": f"its process ended with {process.exitcode}", "at": "start"}
    finally:
        process.kill()
        process.join()


def page(found: dict[str, dict[str, Any]], version: str) -> str:
    counts = {s: sum(f["status"] == s for f in found.values()) for s in ("works", "refused", "failed", "not tried")}
    lines = [
        "# Model families", "",
        f"Written by `python tools/families.py` with transformers {version}, whose registry knows {len(families())}",
        f"families of causal language models and encoder-decoders; {len(found)} of them are below. Each was made",
        "small from its own config class, with random weights, and put through: loading, a first ratio of 1, rows",
        "that do not see each other, LoRA, adapters saved, merged and read back, gradient checkpointing, and a step",
        "each of `sft`, `dpo` and `grpo`.", "",
        f"{counts['works']} work, {counts['refused']} are refused by name, {counts['failed']} fail. Of "
        f"{counts['not tried']} no small config",
        "could be made by setting sizes alone, or the time was up, so nothing is known of them here. A family is",
        "tried with the kinds of layers that its default config has, one of each at least; a model with kinds that",
        "are not known here is refused by name when it is loaded.",
        "", "| family | style | | why |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for kind, f in found.items():
        why = f["why"].replace("|", "/").replace("<", "&lt;")[:180] + (
            f" (at {f['at']})" if f["status"] == "failed" else ""
        )
        lines.append(f"| {kind} | {f['style']} | {f['status']} | {why} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    import peft  # noqa: F401  # once, for all the processes that are forked below
    import torch
    import transformers

    import steersman.cli  # noqa: F401

    torch.set_num_threads(1)
    kept = given.out.with_suffix(".json") if given.out else None
    found = json.loads(kept.read_text()) if kept and kept.exists() and given.only else {}
    for kind, style in families().items():
        if given.only and kind not in given.only:
            continue
        found[kind] = apart(kind, style, given.seconds) | {"style": style}
        print(kind, found[kind]["status"], found[kind].get("at", ""), found[kind]["why"][:150], flush=True)
        if given.out and kept:
            found = dict(sorted(found.items()))
            kept.write_text(json.dumps(found, indent=1) + "\n")
            given.out.write_text(page(found, transformers.__version__))


if __name__ == "__main__":
    main()
