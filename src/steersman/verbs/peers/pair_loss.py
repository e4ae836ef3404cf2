"""Which loss of pairs a file of another toolkit asks for, with the loss's own numbers."""

from __future__ import annotations

from typing import Any

from steersman.guards.untrusted import is_number
from steersman.verbs.peers.translation import Translation, is_on, listed, short
from steersman.verbs.preference import PreferenceRecipe

PAIR_LOSSES = {
    "dpo": {"sigmoid": "dpo", "hinge": "rso", "ipo": "ipo", "robust": "robust_dpo", "sppo_hard": "sppo",
            "orpo": "orpo", "simpo": "simpo", "sigmoid_norm": "dpo_norm", "exo_pair": "exo", "nca_pair": "nca",
            "apo_zero": "apo_zero", "apo_down": "apo_down", "discopop": "discopop", "bco_pair": "bco_pair",
            "aot": "aot", "aot_unpaired": "aot_unpaired", "aot_pair": "aot_unpaired"},
    "cpo": {"sigmoid": "cpo", "hinge": "hinge", "simpo": "simpo"},
    "orpo": {"sigmoid": "orpo"},
    "tpo": {"sigmoid": "cpo", "hinge": "hinge", "tpo-l": "simpo"},
}  # fmt: skip
"""By trainer, their loss: ours. A hinge with a reference is RSO's; `aot_pair` is what TRL called `aot_unpaired`
once."""
ANY = "any"
SMOOTHED = {
    **dict.fromkeys(("dpo", "aot", "aot_unpaired"), "label_smoothing"), "robust_dpo": "flip", "exo": "epsilon",
}  # fmt: skip
PAIR_NUMBERS: dict[str, dict[str, str]] = {
    "beta": {"orpo": "weight", ANY: "beta"},
    "pref_beta": {"orpo": "weight", ANY: "beta"},
    "label_smoothing": SMOOTHED,
    "dpo_label_smoothing": SMOOTHED,
    "simpo_gamma": {"simpo": "margin"},
    "cpo_alpha": {"cpo": "nll_weight", ANY: "loss.nll"},
    "discopop_tau": {"discopop": "tau"},
    "tpo_alpha": {ANY: "loss.gold_nll"},
    "tpo_l_gamma": {"simpo": "margin"},
}
"""By their number and our loss, our setting of that loss, or a key of its own."""
OF_ONE_TRAINER = {"cpo_alpha": "cpo", "tpo_alpha": "tpo", "tpo_l_gamma": "tpo"}
"""Numbers that one trainer alone reads."""
DIVERGENCE_KEYS = ("f_divergence_type", "f_alpha_divergence_coef")
PAIR_DEFAULTS = {
    "simpo": {"beta": 0.1, "margin": 0.5}, "hinge": {"beta": 0.1}, "dpo_norm": {"beta": 0.1},
    "discopop": {"beta": 0.1},
    "cpo": {"nll_weight": 1.0, "length_normalised_nll": 1.0},
}  # fmt: skip
"""What a loss takes there where the file gives nothing, in the places where ours takes another number."""
TRIPLE_DEFAULTS = {
    "cpo": {"beta": 0.01, "nll_weight": 0.0}, "hinge": {"beta": 0.01}, "simpo": {"beta": 0.01, "margin": 0.5},
}  # fmt: skip
"""The same of TPO's trainer, whose likelihood is that of gold answers."""


def pair_loss(t: Translation) -> None:
    """Which loss of pairs, or which several with their weights, and their own numbers."""
    if t.recipe is not PreferenceRecipe:
        if t.settings.get("loss_weights"):
            t.leave("loss_weights", "weighs losses of pairs")
        return
    trainer = _trainer(t)
    source, theirs = _loss_named(t)
    weights = _weights(t, theirs if source else "sigmoid", trainer)
    nll = weights.pop("nll", 0)
    if None in weights or not weights:
        return _leave_loss(t, source, theirs)
    name, settings, divergence = _of_divergence(t, [str(each) for each in weights])
    said = [n for n in (source, *divergence) if n]
    if said or name != "dpo":
        t.put("loss.name", name, *said)
    (_, weight), *more = weights.items()
    also = {str(each): weight for each, weight in more}
    for key, value, plain in (("weight", weight, 1), ("also", also, {}), ("nll", nll, 0)):
        if value != plain:
            t.put(f"loss.{key}", value, *(n for n in (source, "loss_weights") if n in t.settings))
    losses, numbers = [name, *also], _numbers(t)
    settings |= _defaults(t, losses, trainer)
    sources = dict.fromkeys(settings, said)
    for number, value in numbers.items():
        keys = {key for loss in losses if (key := _our_key(number, loss, trainer))}
        for key in keys:
            if key.startswith("loss."):
                t.put(key, value, number)
            else:
                settings[key], sources[key] = value, [number]
        if not keys and value not in (0, None, False):
            t.leave(number, f"loss.name {name} does not read it")
        t.taken.add(number)
    _likelihood(t, name, trainer, numbers)
    for key, value in settings.items():
        t.put(f"loss.settings.{key}", value, *sources[key])


def _trainer(t: Translation) -> str:
    """Whose losses the file names: a key of PAIR_LOSSES."""
    if "tpo_alpha" in t.settings or "tpo_l_gamma" in t.settings:
        return "tpo"
    return next((word for word in t.words if word in ("cpo", "orpo", "tpo")), "dpo")


def _loss_named(t: Translation) -> tuple[str, Any]:
    """The key that names the loss, and its value: a name, or a list of several; ("", None) where none does."""
    source, theirs = t.given("loss_type", "pref_loss")
    if isinstance(theirs, list) and len(theirs) == 1:
        theirs = theirs[0]
    if "ipo" in t.settings:
        t.taken.add("ipo")
        if is_on(t.settings["ipo"]):
            return "ipo", "ipo"
    return source, theirs


def _numbers(t: Translation) -> dict[str, Any]:
    """The numbers of losses that the file gives."""
    return {n: t.settings[n] for n in PAIR_NUMBERS if n in t.settings and n not in t.left}


def _our_key(number: str, loss: str, trainer: str) -> str:
    """What their number is of our loss; "" where the loss has none."""
    if OF_ONE_TRAINER.get(number, trainer) != trainer:
        return ""
    keys = PAIR_NUMBERS[number]
    return keys.get(loss, keys.get(ANY, ""))


def _leave_loss(t: Translation, source: str, theirs: Any) -> None:
    """Leaves out a loss that has no counterpart, and its numbers with it."""
    t.leave(source, f"{short(theirs)} has no counterpart for loss.name")
    for number in (*_numbers(t), *(["loss_weights"] if t.settings.get("loss_weights") else [])):
        t.leave(number, f"belongs to {source} {short(theirs)}, which has no counterpart")


def _defaults(t: Translation, losses: list[str], trainer: str) -> dict[str, Any]:
    """Settings that these losses have there where the file gives none, and not here."""
    found: dict[str, Any] = {}
    for loss in losses:
        found |= (TRIPLE_DEFAULTS if trainer == "tpo" else PAIR_DEFAULTS).get(loss, {})
        if loss == "ipo" and t.toolkit != "openrlhf":
            found["length_normalised"] = 1.0  # means of the answers' log-probabilities, not sums
    return found


def _likelihood(t: Translation, name: str, trainer: str, numbers: dict[str, Any]) -> None:
    """The likelihood that a trainer adds to the loss, where the file does not say how much."""
    if trainer == "cpo" and name != "cpo" and "cpo_alpha" not in numbers:
        t.put("loss.nll", 1.0)
    if trainer == "tpo":
        if "tpo_alpha" not in numbers:
            t.put("loss.gold_nll", 1.0)
        if t.keys["loss.gold_nll"]:
            t.put("data.columns", {"gold": "reference"})


def _weights(t: Translation, theirs: Any, trainer: str) -> dict[str | None, float]:
    """Each loss asked for, by our name and "nll" for the likelihood, with its weight; None in the place of one that
    has no counterpart, and nothing at all where the weights are not those of different losses. A weight of 0 asks for
    nothing."""
    given = t.settings.get("loss_weights")
    if not isinstance(theirs, list):
        if given:
            t.leave("loss_weights", "weighs several losses, and the file has one")
        return {PAIR_LOSSES[trainer].get(str(theirs)): 1}
    names = ["nll" if word == "sft" else PAIR_LOSSES[trainer].get(str(word)) for word in theirs]
    weights = listed(given) if given else [1] * len(names)
    if not len(weights) == len(names) == len(set(names)) or not all(is_number(w) and w >= 0 for w in weights):
        return {}
    return {name: weight for name, weight in zip(names, weights, strict=True) if weight}


def _of_divergence(t: Translation, names: list[str]) -> tuple[str, dict[str, Any], list[str]]:
    """The first of the losses with TRL's `f_divergence_type`, its own settings, and the file's keys that say so."""
    name = names[0]
    kind, coefficient = (t.settings.get(key) for key in DIVERGENCE_KEYS)
    found = [key for key in DIVERGENCE_KEYS if key in t.settings and key not in t.left]
    if kind in (None, "reverse_kl"):
        t.taken.update(found)
        return name, {}, []
    alpha = {"forward_kl": 1.0, "alpha_divergence": 0.5}.get(str(kind))
    if kind == "alpha_divergence" and is_number(coefficient):
        alpha = 1 - float(coefficient)
    if names != ["dpo"] or (kind != "js_divergence" and (alpha is None or not 0 <= alpha <= 1)):
        for key in found:
            t.leave(key, f"{short(t.settings[key])} has no counterpart for {' and '.join(names)}")
        return name, {}, []
    t.taken.update(found)
    return ("fdpo_js", {}, found) if kind == "js_divergence" else ("fdpo_alpha", {"alpha": alpha}, found)
