"""TRL's SDFT: the student's own model, shown more than the student, as its teacher."""

from __future__ import annotations

from typing import Any

from steersman.verbs.peers.translation import Translation, is_number, is_on, short

KINDS = {"base": "start", "live": "live", "ema": "ema"}
"""`teacher_model_kind`: our `teacher.path`."""
DEFAULTS: dict[str, Any] = {
    "teacher_model_kind": "base", "teacher_prompt_template": "{prompt}\n\n{privileged_context}",
    "teacher_update_rate": 0.05, "distillation_alpha": 0.5,
}  # fmt: skip
"""What its settings are there where the file does not say it."""
AVERAGE = ("teacher_update_rate", "teacher_sync_steps")
REASONS = {
    "distillation_topk": "the whole distributions are compared here",
    "distillation_add_tail": "the whole distributions are compared here",
    "distillation_is_clip": "each answer is learned from once here, by the weights that gave it: there is no ratio",
}
"""What has no counterpart because nothing here needs it."""
MODES = {
    "topk_logits": "the student's likeliest tokens there, as if there were no others; whole distributions here",
    "sampled_token": "the token that was drawn alone there; whole distributions here, of which it is a draw",
}


def self_distillation(t: Translation) -> None:
    """The teacher, its prompt and the divergence, with the toolkit's defaults."""
    if t.verb != "distill":
        return
    found = {name: t.settings.get(name, value) for name, value in DEFAULTS.items() if name not in t.left}
    given = {name: [name] if name in t.settings else [] for name in found}
    kind = found.get("teacher_model_kind")
    if kind in KINDS:
        t.put("teacher.path", KINDS[kind], *given["teacher_model_kind"])
    else:
        t.leave("teacher_model_kind", f"{short(kind)} has no counterpart for teacher.path")
    if "teacher_prompt_template" in found:
        t.put("teacher.prompt", found["teacher_prompt_template"], *given["teacher_prompt_template"])
    _average(t, str(kind), found.get("teacher_update_rate"), given)
    if "distillation_alpha" in found:
        _divergence(t, found["distillation_alpha"], given["distillation_alpha"])
    t.put("loss.average", "sequence")
    for name, reason in REASONS.items():
        if t.settings.get(name):
            t.leave(name, reason)
    mode = t.settings.get("distillation_mode")
    if mode in MODES:
        t.leave("distillation_mode", MODES[mode])
    elif mode == "full_logits":
        t.taken.add("distillation_mode")
    if "num_loss_tokens_to_skip" in t.settings and "num_loss_tokens_to_skip" not in t.left:
        t.put("loss.skip_first", t.settings["num_loss_tokens_to_skip"], "num_loss_tokens_to_skip")
    if is_on(t.settings.get("generate_from_teacher")):
        t.leave("generate_from_teacher", "answers are the student's here")
    elif "generate_from_teacher" in t.settings:
        t.taken.add("generate_from_teacher")
    if "temperature" in t.settings and "temperature" not in t.left:
        t.put("loss.temperature", t.settings["temperature"], "temperature")
        t.put("rollout.temperature", t.settings["temperature"], "temperature")


def _average(t: Translation, kind: str, rate: Any, given: dict[str, list[str]]) -> None:
    names = [name for name in AVERAGE if name in t.settings and name not in t.left]
    if kind != "ema":
        for name in names:
            t.leave(name, f"teacher_model_kind is {kind}, which does not read it")
        return
    if is_number(rate) and 0 < rate <= 1:
        t.put("teacher.decay", round(1 - rate, 9), *given["teacher_update_rate"])
    else:
        t.leave("teacher_update_rate", f"{short(rate)} is no share above 0")
    if "teacher_sync_steps" in names:
        t.put("teacher.every", t.settings["teacher_sync_steps"], "teacher_sync_steps")


def _divergence(t: Translation, alpha: Any, names: list[str]) -> None:
    """0 is KL(teacher || student) there, 1 KL(student || teacher), and between them alpha is the teacher's share."""
    if not is_number(alpha) or not 0 <= alpha <= 1:
        return t.leave("distillation_alpha", f"{short(alpha)} is no share")
    t.put("loss.name", "forward_kl" if alpha == 0 else "reverse_kl" if alpha == 1 else "jsd", *names)
    if 0 < alpha < 1:
        t.put("loss.mix", alpha, *names)
