"""TRL's SDFT and SDPO: the student's own model, shown more than the student, as its teacher."""

from __future__ import annotations

from typing import Any

from steersman.guards.untrusted import is_number
from steersman.verbs.peers.translation import Translation, is_on, is_whole, short

KINDS = {"base": "start", "live": "live", "ema": "ema"}
"""`teacher_model_kind`: our `teacher.path`."""
SDFT: dict[str, Any] = {
    "teacher_model_kind": "base", "teacher_prompt_template": "{prompt}\n\n{privileged_context}",
    "teacher_update_rate": 0.05, "distillation_alpha": 0.5, "distillation_mode": "topk_logits",
    "distillation_topk": 100, "distillation_add_tail": False,
}  # fmt: skip
SDPO: dict[str, Any] = {
    "teacher_model_kind": "ema", "teacher_update_rate": 0.05, "distillation_alpha": 1.0,
    "distillation_mode": "sampled_token", "distillation_topk": None, "distillation_add_tail": False,
    "use_successful_as_teacher": True, "success_reward_threshold": 1.0, "distillation_weight": 1.0,
}  # fmt: skip
"""What the settings of either are there where the file does not say it."""
OF_SDPO = (
    "use_successful_as_teacher", "success_reward_threshold", "dont_reprompt_on_self_success", "reprompt_template",
    "solution_template", "feedback_template", "include_environment_feedback", "distillation_weight",
)  # fmt: skip
"""Names that SDFT does not have."""
AVERAGE = ("teacher_update_rate", "teacher_sync_steps")
SWITCHES = {
    "dont_reprompt_on_self_success": ("own", False, True),
    "environment_feedback_only_without_solution": ("beside_solution", True, False),
    "remove_thinking_from_demonstration": ("thinking", True, False),
    "include_environment_feedback": ("column", True, "privileged_context"),
}
"""Of SDPO: our key below `teacher.feedback`, the state that asks for more than our default, and the value then."""
TEMPLATES = {
    "reprompt_template": ("teacher.prompt", "", ""),
    "solution_template": ("teacher.feedback.solution", "{successful_previous_attempt}", "{answer}"),
    "feedback_template": ("teacher.feedback.text", "{feedback_raw}", "{text}"),
}
"""Of SDPO: our key, and the name of what is shown, there and here."""
POLICY_LOSS = ("loss_type", "epsilon", "epsilon_high", "importance_sampling_level", "scale_rewards", "beta")
DRAWN = "the token that was drawn alone there; whole distributions here, of which it is a draw"
ONCE = "each answer is learned from once here, by the weights that gave it: there is no ratio"


def self_distillation(t: Translation) -> None:
    """The teacher, what it is shown, and the divergence, with the toolkit's defaults."""
    if t.verb != "distill":
        return
    rewarded = "sdpo" in t.words or any(name in t.settings for name in OF_SDPO)
    defaults = SDPO if rewarded else SDFT
    found = {name: t.settings.get(name, value) for name, value in defaults.items() if name not in t.left}
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
    _compared(t, found, given)
    t.put("loss.average", "sequence")
    if t.settings.get("distillation_is_clip"):
        t.leave("distillation_is_clip", ONCE)
    if rewarded:
        _feedback(t, found, given)
    if "num_loss_tokens_to_skip" in t.settings and "num_loss_tokens_to_skip" not in t.left:
        t.put("loss.skip_first", t.settings["num_loss_tokens_to_skip"], "num_loss_tokens_to_skip")
    if is_on(t.settings.get("generate_from_teacher")):
        t.leave("generate_from_teacher", "answers are the student's here")
    elif "generate_from_teacher" in t.settings:
        t.taken.add("generate_from_teacher")
    if "temperature" in t.settings and "temperature" not in t.left:
        t.put("loss.temperature", t.settings["temperature"], "temperature")
        t.put("rollout.temperature", t.settings["temperature"], "temperature")


def _feedback(t: Translation, found: dict[str, Any], given: dict[str, list[str]]) -> None:
    """What SDPO's teacher is shown, and whether the policy's own loss has a share."""
    names = [*given.get("use_successful_as_teacher", []), *given.get("success_reward_threshold", [])]
    shows = is_on(found.get("use_successful_as_teacher"))
    t.put("teacher.feedback.success", found.get("success_reward_threshold") if shows else None, *names)
    for name, (key, state, value) in SWITCHES.items():
        if name in t.settings and name not in t.left:
            t.taken.add(name)
            if is_on(t.settings[name]) is state:
                t.put(f"teacher.feedback.{key}", value, name)
    for name, (key, theirs, ours) in TEMPLATES.items():
        if name in t.settings and name not in t.left:
            t.put(key, str(t.settings[name]).replace(theirs, ours) if theirs else t.settings[name], name)
    if "max_reprompt_len" in t.settings:
        t.leave("max_reprompt_len", "cuts off the beginning of a longer prompt there; with "
                "teacher.feedback.max_tokens such answers teach nothing")  # fmt: skip
    if "num_iterations" in t.settings:
        t.leave("num_iterations", ONCE)
    for name in (n for n in POLICY_LOSS if n in t.settings):
        t.leave(name, "is of the policy loss there, which has no share where distillation_weight is 1")
    weight = found.get("distillation_weight")
    if weight == 0:
        t.leave("distillation_weight", "0 is the policy loss alone: --verb grpo")
    elif is_number(weight) and 0 < weight < 1:
        t.leave("distillation_weight", "its policy loss is GRPO's, divided by the group's deviation; what is nearest "
                f"is loss.reward_weight {round(1 / weight - 1, 4):g}, with the reward's own units")  # fmt: skip
    else:
        t.taken.add("distillation_weight")


def _compared(t: Translation, found: dict[str, Any], given: dict[str, list[str]]) -> None:
    """Which tokens are compared at each place."""
    mode, names = found.get("distillation_mode"), given.get("distillation_mode", [])
    if mode == "topk_logits" and is_whole(found.get("distillation_topk")):
        t.put("loss.top_k", found["distillation_topk"], *names, *given["distillation_topk"])
        if not is_on(found.get("distillation_add_tail")):
            t.put("loss.tail", False, *given.get("distillation_add_tail", []))
        t.taken.update(given.get("distillation_add_tail", []))
        return
    if mode in ("sampled_token", "topk_logits") and names:
        t.leave("distillation_mode", DRAWN if mode == "sampled_token" else "distillation_topk is no number of tokens")
    t.taken.update(names)
    for name in ("distillation_topk", "distillation_add_tail"):
        if t.settings.get(name):
            t.leave(name, f"is not read where distillation_mode is {short(mode)}")
        t.taken.update(given.get(name, []))


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
