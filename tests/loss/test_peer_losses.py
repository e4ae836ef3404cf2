"""The offline losses beside TRL's own trainers: same models, same token ids, value and gradient.

Runs where TRL is installed (1.16.0 was current when this was written: `pip install --no-deps trl==1.16.0` does beside
steersman's own requirements and accelerate) and skips elsewhere. Where the two differ by intent, the difference is
written out here as a term, so that it is exactly that and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from letter_models import LETTERS, letters
from tiny_models import tiny_model
from torch import Tensor

from steersman.loss import feedback, preference
from steersman.loss.reduce import denominator, reduce, token_weight
from steersman.loss.supervised import dft
from steersman.model import Policy
from steersman.objectives.preference_config import PairLossConfig
from steersman.types import Tokens

trl = pytest.importorskip("trl", reason="TRL is not installed here; the comparison with it is left out")
pytest.importorskip("accelerate", reason="TRL's trainers need accelerate")

PAIRS = [
    ("the cat", " sat on it.", " no"),
    ("a dog", " ran.", " was so slow and late."),
    ("we", " go, you see", " up"),
]
BETA = 0.3


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    return tuple(tiny_model("llama", vocab=len(LETTERS), seed=s, scale=2.0) for s in (0, 1))


def settings(folder: Path, rows: int) -> dict:
    return {
        "output_dir": str(folder), "report_to": [], "use_cpu": True, "per_device_train_batch_size": rows,
        "bf16": False, "gradient_checkpointing": False, "max_length": None, "beta": BETA,
    }  # fmt: skip


def tokenizer():
    found = letters()
    found.pad_token = found.eos_token
    return found


@pytest.fixture(scope="module")
def dpo_trainer(tmp_path_factory):
    from datasets import Dataset

    data = Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS])
    model, reference = models()
    return trl.DPOTrainer(
        model=model, ref_model=reference, train_dataset=data, processing_class=tokenizer(),
        args=trl.DPOConfig(**settings(tmp_path_factory.mktemp("dpo"), len(PAIRS))),
    )  # fmt: skip


@pytest.fixture(scope="module")
def kto_trainer(tmp_path_factory):
    from datasets import Dataset

    rows = [{"prompt": p, "completion": a, "label": a is c} for p, c, r in PAIRS for a in (c, r)]
    model, reference = models()
    return trl.KTOTrainer(
        model=model, ref_model=reference, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(),
        args=trl.KTOConfig(
            **settings(tmp_path_factory.mktemp("kto"), len(rows)), desirable_weight=1.5, undesirable_weight=0.8
        ),
    )  # fmt: skip


def our_tokens(ids: Tensor, completion: Tensor) -> Tokens:
    """The peer's padded rows as prompts and responses."""
    prompts, responses = [], []
    for row, mask in zip(ids, completion.bool(), strict=True):
        first, last = int(mask.nonzero()[0]), int(mask.nonzero()[-1])
        prompts.append(row[:first].tolist())
        responses.append(row[first : last + 1].tolist())
    return Tokens.from_ids(prompts, responses)


def token_logp(model: torch.nn.Module, tokens: Tokens) -> Tensor:
    policy = Policy(model, None)
    return torch.where(tokens.mask, policy.logp_from(tokens, policy.hidden(tokens)).logp, 0.0)


def our_logp(model: torch.nn.Module, tokens: Tokens) -> Tensor:
    return token_logp(model, tokens).sum(-1)


def our_pair(trainer, batch) -> preference.PairLogp:
    tokens = our_tokens(batch["input_ids"], batch["completion_mask"])
    with torch.no_grad():
        ref_chosen, ref_rejected = token_logp(trainer.ref_model, tokens).chunk(2)
    (chosen, rejected), (mask_w, mask_l) = token_logp(trainer.model, tokens).chunk(2), tokens.mask.chunk(2)
    w = preference.AnswerLogp(chosen, mask_w, ref_chosen)
    return with_batch(preference.pair_logp(w, preference.AnswerLogp(rejected, mask_l, ref_rejected), tails=True))


def with_batch(pair: preference.PairLogp) -> preference.PairLogp:
    return pair._replace(batch=preference.as_batch(pair, torch.ones_like(pair.chosen_length)))


def sft(pair: preference.PairLogp) -> tuple[Tensor, None]:
    """The peer takes one mean over the tokens of a batch; ours is one mean per answer."""
    return preference.chosen_nll(pair) * pair.chosen_length / pair.chosen_length.mean(), None


DPO_TYPES = {
    "sigmoid": (lambda pair: preference.dpo(pair, beta=BETA), {}),
    "robust": (lambda pair: preference.robust_dpo(pair, beta=BETA, flip=0.2), {"label_smoothing": 0.2}),
    "ipo": (lambda pair: preference.ipo(pair, beta=BETA, length_normalised=True), {}),
    "hinge": (lambda pair: preference.rso(pair, beta=BETA), {}),
    "bco_pair": (lambda pair: preference.bco_pair(pair, beta=BETA), {}),
    "aot": (lambda pair: preference.aot(pair, beta=BETA, label_smoothing=0.2), {"label_smoothing": 0.2}),
    "aot_unpaired": (lambda pair: preference.aot_unpaired(pair, beta=BETA), {}),
    "sft": (sft, {}),
}


@pytest.mark.parametrize("name", DPO_TYPES)
def test_pair_losses_with_a_reference(name, dpo_trainer, monkeypatch):
    ours, more = DPO_TYPES[name]
    for key, value in {"loss_types": [name], "loss_weights": [1.0], **more}.items():
        monkeypatch.setattr(dpo_trainer, key, value)
    batch = next(iter(dpo_trainer.get_train_dataloader()))
    same(
        dpo_trainer.compute_loss(dpo_trainer.model, batch), ours(our_pair(dpo_trainer, batch))[0].mean(), dpo_trainer
    )


@pytest.mark.parametrize("name", ["sigmoid", "robust", "hinge", "bco_pair", "aot", "aot_unpaired"])
def test_ld_dpo(name, dpo_trainer, monkeypatch):
    ours, more = DPO_TYPES[name]
    for key, value in {"loss_types": [name], "loss_weights": [1.0], "ld_alpha": 0.4, **more}.items():
        monkeypatch.setattr(dpo_trainer, key, value)
    batch = next(iter(dpo_trainer.get_train_dataloader()))
    pair = with_batch(preference.desensitised(our_pair(dpo_trainer, batch), 0.4))
    same(dpo_trainer.compute_loss(dpo_trainer.model, batch), ours(pair)[0].mean(), dpo_trainer)


def test_mixed_preference_optimisation(dpo_trainer, monkeypatch):
    """But for the likelihood, which is a mean over the tokens of a batch there."""
    monkeypatch.setattr(dpo_trainer, "loss_types", ["sigmoid", "bco_pair", "sft"])
    monkeypatch.setattr(dpo_trainer, "loss_weights", [0.8, 0.2, 1.0])
    batch = next(iter(dpo_trainer.get_train_dataloader()))
    pair = our_pair(dpo_trainer, batch)
    config = PairLossConfig(name="dpo", settings={"beta": BETA}, weight=0.8, also={"bco_pair": 0.2})
    ours = config.of_pair(pair)[0] + sft(pair)[0]
    same(dpo_trainer.compute_loss(dpo_trainer.model, batch), ours.mean(), dpo_trainer)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "tpo-l"])
def test_triple_preference_optimisation(kind, tmp_path):
    """But for the likelihood of the gold answers, which is a mean over the tokens of a batch there."""
    from datasets import Dataset
    from trl.experimental.tpo import TPOConfig, TPOTrainer

    gold = [" looks at you.", " ate", " were there, too."]
    rows = [
        {"prompt": p, "chosen": c, "rejected": r, "reference": g} for (p, c, r), g in zip(PAIRS, gold, strict=True)
    ]
    trainer = TPOTrainer(
        model=models()[0], train_dataset=Dataset.from_list(rows), processing_class=tokenizer(),
        args=TPOConfig(**settings(tmp_path, len(rows)), loss_type=kind, tpo_alpha=0.7, tpo_l_gamma=0.4),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    tokens = our_tokens(batch["input_ids"], batch["completion_mask"])
    (w, l, g), masks = token_logp(trainer.model, tokens).chunk(3), tokens.mask.chunk(3)  # noqa: E741
    pair = preference.pair_logp(preference.AnswerLogp(w, masks[0]), preference.AnswerLogp(l, masks[1]))
    compared = {
        "sigmoid": lambda: preference.cpo(pair, beta=BETA, nll_weight=0.0),
        "hinge": lambda: preference.hinge(pair, beta=BETA),
        "tpo-l": lambda: preference.simpo(pair, beta=BETA, margin=0.4),
    }[kind]()[0]
    length = masks[2].sum(-1)
    likelihood = preference.gold_nll(g, masks[2]) * length / length.float().mean()
    same(trainer.compute_loss(trainer.model, batch), (compared + 0.7 * likelihood).mean(), trainer)


def test_dynamic_fine_tuning(tmp_path):
    from datasets import Dataset

    asked = {key: value for key, value in settings(tmp_path, len(PAIRS)).items() if key != "beta"}
    trainer = trl.SFTTrainer(
        model=models()[0], processing_class=tokenizer(), args=trl.SFTConfig(**asked, loss_type="dft"),
        train_dataset=Dataset.from_list([{"prompt": p, "completion": c} for p, c, _ in PAIRS]),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"]
    tokens = our_tokens(batch["input_ids"], labels != -100)
    loss = dft(token_logp(trainer.model, tokens))
    ours = reduce(loss, token_weight(tokens.mask, "token"), denominator(tokens.mask, "token"))
    same(trainer.compute_loss(trainer.model, batch), ours, trainer)


def test_unpaired_apo_zero(kto_trainer, monkeypatch):
    monkeypatch.setattr(kto_trainer, "loss_type", "apo_zero_unpaired")
    monkeypatch.setattr(kto_trainer, "calculate_KL", False)
    batch = next(iter(kto_trainer.get_train_dataloader()))
    tokens = our_tokens(batch["input_ids"], batch["completion_mask"])
    with torch.no_grad():
        ref = our_logp(kto_trainer.ref_model, tokens)
    loss, _ = feedback.apo_zero_unpaired(
        our_logp(kto_trainer.model, tokens), ref, batch["label"].bool(), beta=BETA, desirable_weight=1.5,
        undesirable_weight=0.8,
    )  # fmt: skip
    same(kto_trainer.compute_loss(kto_trainer.model, batch), loss.mean(), kto_trainer)


def test_kto(kto_trainer):
    batch = next(iter(kto_trainer.get_train_dataloader()))
    tokens = our_tokens(batch["input_ids"], batch["completion_mask"])
    apart = our_tokens(batch["KL_input_ids"], batch["KL_completion_mask"])
    logp = our_logp(kto_trainer.model, tokens)
    with torch.no_grad():
        ref, apart_ref = (our_logp(kto_trainer.ref_model, t) for t in (tokens, apart))
        point = feedback.kto_reference_point(our_logp(kto_trainer.model, apart), apart_ref)
    loss, _ = feedback.kto(
        logp, ref, batch["label"].bool(), point, beta=BETA, desirable_weight=1.5, undesirable_weight=0.8
    )
    same(kto_trainer.compute_loss(kto_trainer.model, batch), loss.mean(), kto_trainer)


def same(theirs: Tensor, ours: Tensor, trainer) -> None:
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    torch.testing.assert_close(theirs.float(), ours.float(), rtol=1e-4, atol=1e-6)
    for a, b in zip(torch.autograd.grad(theirs, weights), torch.autograd.grad(ours, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4 * float(b.abs().max()) + 1e-7)


def answers() -> preference.PairLogp:
    g = torch.Generator().manual_seed(0)
    chosen, rejected = (-8 * torch.rand(2, 6, generator=g, dtype=torch.float64)).unbind()
    length = torch.randint(2, 9, (2, 6), generator=g).double()
    return preference.PairLogp(chosen.requires_grad_(), rejected.requires_grad_(), length[0], length[1])


def peer(**given) -> SimpleNamespace:
    """What the peer's method reads of its trainer."""
    device = SimpleNamespace(device=torch.device("cpu"))
    return SimpleNamespace(**{"alpha": 0.0, "label_smoothing": 0.0, "accelerator": device, "beta": BETA, **given})


def test_cpo_and_simpo_and_slic():
    from trl.experimental.cpo import CPOTrainer

    pair = answers()
    means = pair.chosen / pair.chosen_length, pair.rejected / pair.rejected_length
    cases = {
        "cpo": (
            peer(loss_type="sigmoid"),
            (pair.chosen, pair.rejected),
            preference.cpo(pair, beta=BETA, nll_weight=0.0),
        ),
        "simpo": (peer(loss_type="simpo", simpo_gamma=0.5), means, preference.simpo(pair, beta=BETA, margin=0.5)),
        "slic": (peer(loss_type="hinge"), (pair.chosen, pair.rejected), preference.hinge(pair, beta=BETA)),
    }
    for name, (trainer, logps, (ours, _)) in cases.items():
        theirs, _, _ = CPOTrainer.cpo_loss(trainer, *logps)
        torch.testing.assert_close(theirs, ours, msg=name)
        grads = [torch.autograd.grad(x.sum(), pair[:2], retain_graph=True) for x in (theirs, ours)]
        torch.testing.assert_close(*grads, msg=name)


def test_orpo():
    """The odds-ratio term; the likelihood term differs by intent (see the docstring of `orpo`)."""
    from trl.experimental.orpo import ORPOTrainer

    pair = answers()
    means = pair.chosen / pair.chosen_length, pair.rejected / pair.rejected_length
    odds, *_ = ORPOTrainer.odds_ratio_loss(peer(), *means)
    ours, _ = preference.orpo(pair, weight=BETA)
    theirs = -means[0] - odds.double()
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(x.sum(), pair[:2], retain_graph=True) for x in (theirs, ours)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
