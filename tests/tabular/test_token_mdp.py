"""The token oracle, checked against answers that are computed another way."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from steersman.tabular.language import Language
from steersman.tabular.token_mdp import TokenMDP
from steersman.types import SteersmanError


def make(beta=0.7, **kwargs) -> TokenMDP:
    return TokenMDP.random(vocab=3, horizon=3, beta=beta, seed=1, **{"prompts": 2, "per_token": True, **kwargs})


def policy(mdp, seed=5) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(mdp.next_state.shape, generator=rng, dtype=torch.float64)


def by_hand(mdp, logits):
    """(prompt, tokens, prob, [(logp, logp_ref, reward)...]) by walking dictionaries, not tensors."""
    where = {state: s for s, state in enumerate(mdp.states)}
    logp, ref = torch.log_softmax(logits, -1), mdp.logp_ref
    for k in range(len(mdp.prompts)):
        for n in range(1, mdp.horizon + 1):
            for tokens in itertools.product(range(mdp.vocab), repeat=n):
                if mdp.eos in tokens[:-1] or (n < mdp.horizon and tokens[-1] != mdp.eos):
                    continue
                steps = [(where[k, tokens[:t]], a) for t, a in enumerate(tokens)]
                terms = [(float(logp[s, a]), float(ref[s, a]), float(mdp.step_reward[s, a])) for s, a in steps]
                prob = float(mdp.prompt_prob[k]) * math.exp(sum(x[0] for x in terms))
                yield k, tokens, prob, terms


@pytest.mark.parametrize(("vocab", "horizon", "eos"), [(2, 1, 0), (3, 3, 2), (4, 3, 1)])
def test_every_sequence_is_listed_once_and_probabilities_add_up(vocab, horizon, eos):
    language = Language(vocab, horizon, eos=eos, prompts=2)
    assert len(language) == 2 * sum((vocab - 1) ** t for t in range(horizon + 1))
    rows = zip(language.prompt.tolist(), language.sequences, language.length.tolist(), strict=True)
    distinct = {(k, tuple(y[:n].tolist())) for k, y, n in rows}
    assert len(distinct) == len(language)
    assert all((y[-1] == eos) or (len(y) == horizon) for _, y in distinct)
    assert all(eos not in y[:-1] for _, y in distinct)
    last = language.sequences.gather(1, language.length[:, None] - 1).squeeze(1)
    assert torch.equal(language.terminated, last == eos)
    prob = language.sequence_prob(policy(language))
    assert float(prob.sum()) == pytest.approx(1, abs=1e-14)
    assert torch.equal(language.mask.sum(-1), language.length)
    visits = language.state_prob(policy(language))
    assert float(visits.sum()) == pytest.approx(float((prob * language.length).sum()), abs=1e-14)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_objective_against_a_walk_by_hand(gamma):
    mdp = make()
    logits = policy(mdp)
    j = r = kl = entropy = 0.0
    for _, _, prob, terms in by_hand(mdp, logits):
        j += prob * sum(gamma**t * (x - mdp.beta * (p - q)) for t, (p, q, x) in enumerate(terms))
        r += prob * sum(x for _, _, x in terms)
        kl += prob * sum(p - q for p, q, _ in terms)
        entropy -= prob * sum(p for p, _, _ in terms)
    assert float(mdp.objective(logits, gamma)) == pytest.approx(j, abs=1e-13)
    assert float(mdp.expected_reward(logits)) == pytest.approx(r, abs=1e-13)
    assert float(mdp.kl(logits)) == pytest.approx(kl, abs=1e-13)
    assert float(mdp.entropy(logits)) == pytest.approx(entropy, abs=1e-13)
    value, _ = mdp.evaluate(logits, gamma)
    assert float((mdp.prompt_prob * value[:2]).sum()) == pytest.approx(j, abs=1e-13)


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_gradient_against_finite_differences(beta):
    mdp = make(beta)
    logits = policy(mdp).requires_grad_()
    torch.autograd.gradcheck(mdp.objective, (logits,), atol=1e-8)
    torch.autograd.gradcheck(lambda x: mdp.evaluate(x, 0.9), (logits,), atol=1e-8)


def test_reward_function_sees_prompt_and_response():
    mdp = TokenMDP(3, 2, lambda x, y: 10 * x[0] + len(y) + 0.5 * (y[-1] == 0), prompts=[[1], [2]])
    for k, y, n, r in zip(mdp.prompt, mdp.sequences, mdp.length, mdp.total_reward, strict=True):
        assert float(r) == 10 * (int(k) + 1) + int(n) + 0.5 * (int(y[n - 1]) == 0)


@pytest.mark.parametrize("beta", [0.3, 0.7, 5.0])
def test_optimum_agrees_between_sequences_and_bellman(beta):
    mdp = make(beta)
    value, q = mdp.optimal_values()
    log_star, optimum = mdp.closed_form()
    pi = mdp.pi_star()
    torch.testing.assert_close(mdp.sequence_logp(pi).sum(-1), log_star, rtol=0, atol=1e-12)
    torch.testing.assert_close(value[:2], optimum, rtol=0, atol=1e-12)
    torch.testing.assert_close(pi, mdp.logp_ref + (q - value[:, None]) / beta, rtol=0, atol=1e-12)
    torch.testing.assert_close(mdp.objective(pi), mdp.j_star(), rtol=0, atol=1e-12)
    # under pi* every token is worth the same: nothing is left to gain
    v, advantage = mdp.evaluate(pi)
    torch.testing.assert_close(v, value, rtol=0, atol=1e-12)
    torch.testing.assert_close(advantage, v[:, None].expand_as(advantage), rtol=0, atol=1e-12)


def test_pi_star_is_the_maximum():
    mdp = make()
    pi = mdp.pi_star()
    leaf = pi.clone().requires_grad_()
    (grad,) = torch.autograd.grad(mdp.objective(leaf), leaf)
    assert float(grad.abs().max()) < 1e-13
    for seed in range(20):
        assert float(mdp.objective(pi + 0.1 * policy(mdp, seed))) < float(mdp.j_star()) - 1e-6


def test_beta_zero_is_the_plain_maximum_and_the_limit():
    mdp = make(0.0)
    best = [mdp.total_reward[mdp.prompt == k].max() for k in range(2)]
    assert float(mdp.j_star()) == pytest.approx(float(sum(best) / 2), abs=1e-14)
    torch.testing.assert_close(mdp.optimal_values()[0][:2], torch.stack(best), rtol=0, atol=1e-14)
    torch.testing.assert_close(mdp.objective(mdp.pi_star()), mdp.j_star(), rtol=0, atol=1e-14)
    # with ties, the limit of small beta: the reference kept on the best sequences
    flat, near = (TokenMDP(3, 3, lambda x, y: float(len(y) > 1), policy(mdp)[::2], b) for b in (0.0, 1e-3))
    torch.testing.assert_close(
        flat.sequence_prob(flat.pi_star()), near.sequence_prob(near.pi_star()), rtol=0, atol=1e-12
    )


def test_forbidden_tokens_stay_finite():
    mdp = make()
    logits = policy(mdp)
    logits[0, 1] = -torch.inf
    logits.requires_grad_()
    for f in (mdp.objective, mdp.kl, mdp.entropy, lambda x: mdp.evaluate(x)[0].sum()):
        (grad,) = torch.autograd.grad(f(logits), logits)
        assert grad.isfinite().all()
        assert float(grad[0, 1]) == 0
    ref = make().logp_ref.clone()
    ref[0, 1] = -torch.inf
    cut = TokenMDP(3, 3, mdp.score, ref, 0.5, prompts=2)
    torch.testing.assert_close(cut.objective(cut.pi_star()), cut.j_star(), rtol=0, atol=1e-12)


def test_factor_gives_back_any_distribution():
    mdp = make()
    weight = torch.randn(len(mdp), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = [torch.softmax(weight[mdp.prompt == k], 0) / 2 for k in range(2)]
    prob = mdp.sequence_prob(mdp.factor(weight))
    for k in range(2):
        torch.testing.assert_close(prob[mdp.prompt == k], want[k], rtol=0, atol=1e-14)


@pytest.mark.parametrize("cut", ["truncate", "terminate"])
def test_trajectory_returns_are_the_objective(cut):
    mdp = make(cut=cut)
    logits, gamma = policy(mdp), 0.9
    tr = mdp.trajectory(logits, gamma=gamma)
    prob = mdp.sequence_prob(logits)
    steps = gamma ** torch.arange(3, dtype=torch.float64)
    assert float((prob * (steps * tr.reward).sum(-1)).sum()) == pytest.approx(float(mdp.objective(logits, gamma)))
    # one-step Bellman: the reward plus the discounted next value averages to the value, wherever one is
    delta = tr.reward + tr.discount * tr.value[:, 1:] - tr.value[:, :-1]
    for t in range(3):
        for s in torch.unique(mdp.path[:, t][mdp.mask[:, t]]):
            here = mdp.path[:, t] == s
            assert float((prob[here] * delta[here, t]).sum()) == pytest.approx(0, abs=1e-14)
    last = mdp.length - 1
    at_end = tr.discount.gather(1, last[:, None]).squeeze(1)
    assert (at_end[mdp.terminated] == 0).all()
    assert (at_end[~mdp.terminated] == (gamma if cut == "truncate" else 0)).all()
    assert (tr.value.gather(1, mdp.length[:, None]) == 0).all()
    assert (tr.reward[~tr.mask] == 0).all()
    assert (tr.discount[~tr.mask] == 0).all()
    assert torch.equal(tr.group, mdp.prompt)
    rows = torch.tensor([4, 4, 0])
    part = mdp.trajectory(logits, rows, gamma=gamma, value=torch.arange(len(mdp.states)).double())
    torch.testing.assert_close(part.reward, tr.reward[rows])
    assert part.value[0, 0] == mdp.path[4, 0]


def test_rewards_without_kl_term():
    mdp = make()
    tr = mdp.trajectory(policy(mdp), kl=False)
    torch.testing.assert_close(tr.reward.sum(-1), mdp.total_reward)
    prob = mdp.sequence_prob(policy(mdp))
    assert float((prob * tr.value[:, 0]).sum()) == pytest.approx(float(mdp.expected_reward(policy(mdp))))


def test_sampling_frequencies():
    mdp = TokenMDP(3, 2, lambda x, y: 0.0, prompts=2, prompt_prob=torch.tensor([0.25, 0.75]))
    rng = torch.Generator().manual_seed(0)
    rows = mdp.sample(policy(mdp), 100_000, rng, size=2).reshape(-1, 2)
    assert (mdp.prompt[rows[:, 0]] == mdp.prompt[rows[:, 1]]).all()
    share = torch.bincount(rows.flatten(), minlength=len(mdp)) / rows.numel()
    torch.testing.assert_close(share.double(), mdp.sequence_prob(policy(mdp)), rtol=0, atol=0.005)


def test_greedy_follows_the_largest_logit():
    mdp = make()
    sharp = 1e3 * policy(mdp)
    prob = mdp.sequence_prob(sharp)
    rows = mdp.greedy(sharp)
    torch.testing.assert_close(prob[rows], torch.full((2,), 0.5, dtype=torch.float64))


def test_preference_pairs():
    mdp = make()
    pairs = mdp.preference_pairs()
    assert float(pairs.weight.sum()) == pytest.approx(1)
    assert (mdp.prompt[pairs.first] == mdp.prompt[pairs.second]).all()
    assert (pairs.first != pairs.second).all()
    back = {(int(a), int(b)): float(p) for a, b, p in zip(pairs.first, pairs.second, pairs.prefer, strict=True)}
    assert all(back[a, b] + back[b, a] == pytest.approx(1) for a, b in back)
    a, b = next(iter(back))
    gap = float(mdp.total_reward[a] - mdp.total_reward[b])
    assert back[a, b] == pytest.approx(1 / (1 + math.exp(-gap)))
    # the population DPO loss is stationary at pi*: pi* makes the log-ratios the rewards
    logits = mdp.pi_star().requires_grad_()
    ratio = mdp.beta * (mdp.sequence_logp(logits) - mdp.sequence_logp_ref).sum(-1)
    margin = ratio[pairs.first] - ratio[pairs.second]
    nll = pairs.prefer * torch.nn.functional.logsigmoid(margin)
    (grad,) = torch.autograd.grad((pairs.weight * nll).sum(), logits)
    assert float(grad.abs().max()) < 1e-14


def test_a_transformer_is_read_on_every_prefix():
    from transformers import AutoModelForCausalLM, GPT2Config

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=3, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    mdp = make(prompts=[[1, 2], [2]])
    logits = mdp.logits_of(model)
    for s, (k, tokens) in enumerate(mdp.states):
        alone = model(torch.tensor([[*mdp.prompts[k], *tokens]])).logits[0, -1]
        torch.testing.assert_close(logits[s], alone, rtol=0, atol=1e-12)
    tokens = mdp.tokens()
    assert len(tokens) == len(mdp)
    n = 7
    text = [*tokens.prompt[n, : tokens.prompt_length[n]], *tokens.response[n, : tokens.response_length[n]]]
    logp = torch.log_softmax(model(torch.tensor([text])).logits[0, :-1], -1)
    taken = logp.gather(1, torch.tensor(text[1:])[:, None]).squeeze(1)[-int(mdp.length[n]) :]
    torch.testing.assert_close(mdp.sequence_logp(logits)[n][: mdp.length[n]], taken, rtol=0, atol=1e-12)
    mdp.objective(logits).backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(SteersmanError, match="3 tokens and the language 4"):
        Language(4, 2).logits_of(model)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Language(1, 3), "vocab 1"),
        (lambda: Language(3, 3, eos=3), "eos 3"),
        (lambda: Language(3, 3, prompts=[[0], [0]]), "all different"),
        (lambda: Language(3, 3, prompts=4), r"0\.\.2"),
        (lambda: Language(10, 9), "too many"),
        (lambda: Language(3, 2, prompts=2, prompt_prob=torch.tensor([0.5, 0.6])), "add up to 1"),
        (lambda: TokenMDP(3, 2, torch.zeros(6)), "7 finite numbers"),
        (lambda: TokenMDP(3, 1, lambda x, y: math.nan), "finite"),
        (lambda: TokenMDP(3, 1, torch.zeros(3), beta=-1.0), "negative"),
        (lambda: TokenMDP(3, 1, torch.zeros(3), torch.full((1, 3), -torch.inf)), "NaN"),
        (lambda: TokenMDP(3, 2, torch.zeros(7), torch.zeros(2, 3)), r"\[3, 3\]"),
    ],
)
def test_refusals_name_the_problem(build, message):
    with pytest.raises(SteersmanError, match=message):
        build()
