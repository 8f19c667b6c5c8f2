"""The language with a known entropy, the training that is read at any time, and the fit of the law.

Each check function takes the module, so that it can be run on a copy with one line broken: `MUTATIONS` lists the lines
and the check that must catch each.
"""

import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from utils import scaling
from utils.lab import LabError

LAW = scaling.ScalingLaw(E=1.7, A=30.0, alpha=0.45, B=90.0, beta=0.4)
SIZES, READS = np.array([1e3, 2e3, 4e3, 8e3, 16e3, 32e3]), np.array([3e4, 6e4, 12e4, 24e4, 48e4, 96e4])


def runs(law=LAW, noise=0.0, seed=0):
    """Parameters, tokens and losses of a grid of runs that follow `law`."""
    n, d = (values.ravel() for values in np.meshgrid(SIZES, READS, indexing="ij"))
    return n, d, law.loss(n, d) * np.exp(noise * np.random.default_rng(seed).normal(size=n.size))


class Knows(torch.nn.Module):
    """A model that gives the true probabilities of a language, or those of another one."""

    def __init__(self, language):
        super().__init__()
        self.table = language.transition

    def forward(self, ids):
        return types.SimpleNamespace(logits=self.table[ids].log())


# --- checks, each of a module ----------------------------------------------------------------------------------------


def check_entropy(module):
    """Against the closed form of two words, and against torch's Categorical with a long power iteration."""
    a, b = 0.3, 0.1
    two = module.markov_language(torch.tensor([[1 - a, a], [b, 1 - b]]))
    torch.testing.assert_close(two.stationary, torch.tensor([b, a]).double() / (a + b), atol=1e-7, rtol=0)
    language = module.zipf_language(40, seed=3)
    shares = torch.full((40,), 1 / 40, dtype=torch.float64)
    for _ in range(2000):
        shares = shares @ language.transition
    torch.testing.assert_close(language.stationary, shares, atol=1e-12, rtol=0)
    after_each = torch.distributions.Categorical(probs=language.transition).entropy()
    assert language.entropy == pytest.approx((shares * after_each).sum().item(), abs=1e-9)


def check_zipf(module):
    """Without patterns every row is Zipf's law; with them, row scores have the variance that the docstring gives."""
    plain = module.zipf_language(30, zipf=1.2, strength=0.0)
    expected = torch.arange(1, 31).double() ** -1.2
    torch.testing.assert_close(plain.transition, (expected / expected.sum()).expand(30, 30))
    scores = module.zipf_language(200, zipf=0.0, strength=0.5, decay=0.75).transition.log()
    scores = scores - scores.mean(1, keepdim=True)
    variance = (0.5 * torch.arange(1, 201).double() ** -0.75).square().sum().item()
    assert scores.var().item() == pytest.approx(variance, rel=0.1)
    explained = torch.linalg.svdvals(scores).square().cumsum(0)
    assert explained[15] / explained[-1] > 0.75, "patterns must fall in importance"


def check_sample(module):
    """Frequencies of words and of pairs in a large sample are those of the language, within sampling error."""
    language = module.zipf_language(12, zipf=1.0, seed=1)
    texts = module.sample(language, 20_000, 9, seed=5)
    assert texts.shape == (20_000, 9)
    assert texts.dtype == torch.int64
    for position in (0, 8):
        shares = torch.bincount(texts[:, position], minlength=12) / len(texts)
        torch.testing.assert_close(shares.double(), language.stationary, atol=0.012, rtol=0)
    pairs = torch.bincount((texts[:, :-1] * 12 + texts[:, 1:]).flatten(), minlength=144).reshape(12, 12).double()
    expected = language.stationary[:, None] * language.transition
    torch.testing.assert_close(pairs / pairs.sum(), expected, atol=0.004, rtol=0)
    assert torch.equal(texts, module.sample(language, 20_000, 9, seed=5))
    assert not torch.equal(texts, module.sample(language, 20_000, 9, seed=6))


def check_expected_loss(module):
    """A model that knows the language has its entropy as loss; another has what torch's own losses say."""
    language, other = module.zipf_language(20, seed=0), module.zipf_language(20, seed=1)
    texts = module.sample(language, 3000, 17, seed=2)
    assert module.expected_loss(Knows(language), language, texts) == pytest.approx(language.entropy, abs=1e-6)
    loss = module.expected_loss(Knows(other), language, texts, batch_size=7)
    context = texts[:, :-1].flatten()
    gap = F.kl_div(other.transition[context].log(), language.transition[context], reduction="batchmean").item()
    assert loss == pytest.approx(language.entropy + gap, abs=1e-5)
    sampled = F.cross_entropy(other.transition[context].log(), texts[:, 1:].flatten()).item()
    assert loss == pytest.approx(sampled, abs=0.05)


def check_training(module):
    """The evaluated weights are torch's AveragedModel of a plain loop with torch's AdamW and clipped gradients."""
    language = module.zipf_language(16, seed=0)
    texts = module.sample(language, 120, 9, seed=1)
    seen = []

    def large_gradients():
        model = module.tiny_decoder(16, 4)
        model.lm_head.weight.data.mul_(50)
        return model

    def evaluate(model):
        seen.append(torch.cat([w.detach().flatten() for w in model.parameters()]).clone())
        return module.expected_loss(model, language, texts)

    model = large_gradients()
    losses = module.train_and_read(model, texts, [64, 960], evaluate, batch_size=4, learning_rate=0.02)
    assert len(losses) == len(seen) == 2
    assert losses[0] > losses[1] > language.entropy

    plain = large_gradients()
    average = torch.optim.swa_utils.AveragedModel(plain, avg_fn=lambda a, w, n: a + (w - a) * 9 / (n + 9))
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.0, 0.999), weight_decay=0.0)
    states, norms = [], []
    for step in range(1, 31):
        optimizer.param_groups[0]["lr"] = 0.02 * math.sqrt(2) * min(1, step / 20)
        batch = texts[4 * step - 4 : 4 * step]
        optimizer.zero_grad()
        plain(batch, labels=batch).loss.backward()  # transformers shifts the labels itself
        norms.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0))
        optimizer.step()
        average.update_parameters(plain)
        states.append(torch.cat([w.detach().flatten() for w in average.module.parameters()]).clone())
    assert min(norms) < 1 < max(norms), "the comparison must have steps with and without clipping"
    torch.testing.assert_close(seen[0], states[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen[1], states[29], atol=2e-3, rtol=1e-2)


def check_reads(module):
    """`evaluate` is called at the read-outs and at no other step, on one thread; the number of threads is as before."""
    texts = module.sample(module.zipf_language(16), 120, 9)
    model, steps, calls, threads = module.tiny_decoder(16, 2), [], [], []
    model.register_forward_hook(lambda *_: steps.append(1))

    def evaluate(averaged):
        assert averaged is not model
        calls.append(len(steps))
        threads.append(torch.get_num_threads())
        return float(len(calls))

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        losses = module.train_and_read(model, texts, [32, 64, 160], evaluate, batch_size=4)
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert calls == [1, 2, 5]
    assert losses == [1, 2, 3]
    assert (threads, after) == ([1, 1, 1], 2)


def check_law(module):
    """The law's parts against autograd and against each other."""
    law = module.ScalingLaw(E=1.7, A=30.0, alpha=0.45, B=90.0, beta=0.4)
    assert law.loss(1e4, 1e6) == pytest.approx(1.7 + 30 / 1e4**0.45 + 90 / 1e6**0.4)
    assert law.loss(SIZES[:, None], READS).shape == (6, 6)
    tokens = law.tokens_to_reach(2.5, np.array([1e2, 1e4, 1e6]))
    assert np.isinf(tokens[0]), "too small a model never gets there"
    np.testing.assert_allclose(law.loss([1e4, 1e6], tokens[1:]), 2.5)


def check_compute_optimal(module):
    """The optimum spends the budget, and torch's L-BFGS finds no better place on the line of equal compute."""
    for law in (module.CHINCHILLA, module.REPLICATION, module.ScalingLaw(1.7, 30.0, 0.45, 90.0, 0.4)):
        for budget in (1e18, 1e24):
            n, d = law.compute_optimal(budget)
            assert 6 * n * d == pytest.approx(budget)
            log_n = torch.tensor(math.log(budget) / 2, dtype=torch.float64, requires_grad=True)
            optimizer = torch.optim.LBFGS([log_n], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-15)

            def closure(law=law, budget=budget, log_n=log_n, optimizer=optimizer):
                optimizer.zero_grad()
                log_d = math.log(budget / 6) - log_n
                loss = law.A * torch.exp(-law.alpha * log_n) + law.B * torch.exp(-law.beta * log_d)
                loss = 100 * loss.log()
                loss.backward()
                return loss

            optimizer.step(closure)
            assert n == pytest.approx(math.exp(log_n.item()), rel=1e-3)


def objective(law, n, d, losses):
    """Hoffmann et al.'s objective with torch's Huber loss."""
    predicted = torch.tensor(law.loss(n, d)).log()
    return F.huber_loss(predicted, torch.tensor(losses).log(), delta=1e-3, reduction="sum").item()


def lbfgs_fit(n, d, losses):
    """The law fitted by torch's L-BFGS to torch's Huber loss, begun at `LAW`."""
    log_n, log_d, target = (torch.tensor(values, dtype=torch.float64).log() for values in (n, d, losses))
    start = [math.log(LAW.E), math.log(LAW.A), LAW.alpha, math.log(LAW.B), LAW.beta]
    theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=3000, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-16
    )

    def closure():
        optimizer.zero_grad()
        e, a, alpha, b, beta = theta
        terms = torch.stack([e.expand(len(target)), a - alpha * log_n, b - beta * log_d])
        loss = 1e4 * F.huber_loss(terms.logsumexp(0), target, delta=1e-3, reduction="sum")
        loss.backward()
        return loss

    optimizer.step(closure)
    e, a, alpha, b, beta = theta.tolist()
    return scaling.ScalingLaw(math.exp(e), math.exp(a), alpha, math.exp(b), beta)


def check_fit(module):
    """Exact data give the law back; noisy data give torch's own optimum; one bad run moves nothing."""
    found = module.fit_scaling_law(*runs())
    for name in ("E", "A", "alpha", "B", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(LAW, name), rel=1e-3)
    n, d, losses = runs(noise=2e-3, seed=1)
    ours, theirs = module.fit_scaling_law(n, d, losses), lbfgs_fit(n, d, losses)
    assert objective(ours, n, d, losses) <= objective(theirs, n, d, losses) * (1 + 1e-3)
    assert pytest.approx(theirs.E, rel=5e-3) == ours.E
    n, d, losses = runs()
    losses[7] *= 1.5
    assert abs(module.fit_scaling_law(n, d, losses).E / LAW.E - 1) < 2e-3


def check_bootstrap(module):
    """On exact data every resample gives the law back; on noisy data the intervals cover it and are of use."""
    laws = module.bootstrap_laws(*runs(), resamples=20)
    assert len(laws) == 20
    assert np.allclose([law.E for law in laws], LAW.E, rtol=5e-3)
    covered, widths = [], []
    for seed in range(10):
        n, d, losses = runs(noise=5e-4, seed=seed)
        low, high = np.quantile([law.E for law in module.bootstrap_laws(n, d, losses, resamples=50)], [0.025, 0.975])
        covered.append(low <= LAW.E <= high)
        widths.append(high - low)
    assert np.mean(covered) >= 0.8
    assert np.median(widths) < 0.1 * LAW.E, "an interval that covers everything says nothing"


def check_resamples(module):
    """As many draws as there are, at least three different ones; a run that is drawn twice counts as two runs."""
    counts = module._draws(np.random.default_rng(0), 200, 6)
    assert (counts.sum(1) == 6).all()
    assert (counts > 0).sum(1).min() == 3
    n, d, losses = runs(noise=2e-3, seed=3)
    start = np.array([[math.log(LAW.E), math.log(LAW.A), LAW.alpha, math.log(LAW.B), LAW.beta]])
    twice = np.where(np.arange(len(n)) % 3 == 0, 2, 1)
    fit, value = module._fit(n, d, losses, starts=start, weights=twice[None])
    again, same = module._fit(*(np.repeat(x, twice) for x in (n, d, losses)), starts=start)
    assert value == pytest.approx(same)
    np.testing.assert_allclose(fit, again, rtol=1e-4)


def check_bootstrap_varies(module):
    """On noisy data the resamples differ, also when only rows or only columns are disturbed."""
    n, d, losses = runs()
    by_row = losses * np.exp(3e-3 * np.array([1, -1, 1, -1, 1, -1]))[np.searchsorted(SIZES, n)]
    by_column = losses * np.exp(3e-3 * np.array([1, -1, 1, -1, 1, -1]))[np.searchsorted(READS, d)]
    for disturbed in (by_row, by_column):
        assert np.std([law.E for law in module.bootstrap_laws(n, d, disturbed, resamples=30)]) > 1e-3


def check_published(module):
    """Kaplan's exponents and unit; the refitted law agrees with Chinchilla's own 20 tokens a parameter, Kaplan's with neither."""
    day = 1e15 * 24 * 3600
    assert module.kaplan_optimal(day)[0] == pytest.approx(1.3e9)
    n, d = module.kaplan_optimal(1000 * day)
    assert n == pytest.approx(1.3e9 * 1000**0.73)
    assert 6 * n * d == pytest.approx(1000 * day)
    chinchilla = module.TRAINING_RUNS["Chinchilla"]
    n, d = module.REPLICATION.compute_optimal(chinchilla.compute)
    assert 15 < d / n < 30
    assert n == pytest.approx(chinchilla.parameters, rel=0.2)
    assert chinchilla.compute == pytest.approx(5.88e23)
    assert module.kaplan_optimal(chinchilla.compute)[0] > 5 * n


# --- the tests -------------------------------------------------------------------------------------------------------

CHECKS = [
    check_entropy, check_zipf, check_sample, check_expected_loss, check_training, check_reads, check_law,
    check_compute_optimal, check_fit, check_bootstrap, check_resamples, check_bootstrap_varies, check_published,
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_module_passes(check):
    check(scaling)


MUTATIONS = [
    # entropy and language
    ("equations = transition.T - torch.eye", "equations = transition - torch.eye", check_entropy),
    ("stationary[:, None] * torch.xlogy", "torch.xlogy", check_entropy),
    ("scores = -zipf * rank.log()", "scores = zipf * rank.log()", check_zipf),
    ("(u * strength * rank**-decay) @ v.T", "(u * strength) @ v.T", check_zipf),
    ("scores.softmax(1)", "scores.softmax(0).T", check_zipf),
    ("words[-1] + drawn, right=True", "words[-2 if len(words) > 1 else -1] + drawn, right=True", check_sample),
    ("torch.multinomial(language.stationary,", "torch.multinomial(torch.ones_like(language.stationary),", check_sample),
    # loss and training
    ("return language.entropy + total", "return total", check_expected_loss),
    ("torch.xlogy(truth, truth) - truth * logprobs", "truth * logprobs - torch.xlogy(truth, truth)", check_expected_loss),
    (".log_softmax(-1)\n        total", ".softmax(-1)\n        total", check_expected_loss),
    ("batch[:, 1:].flatten())", "batch[:, :-1].flatten())", check_training),
    ("            optimizer.zero_grad()\n", "", check_training),
    ("            torch.nn.utils.clip_grad_norm_(weights, 1.0)\n", "", check_training),
    ("[w.data for w in weights], 9 / (step + 8)", "[w.data for w in weights], 1 / step", check_training),
    ("if step in steps:", "if True:", check_reads),
    ("    torch.set_num_threads(1)\n", "", check_reads),
    ("        torch.set_num_threads(threads)", "        pass", check_reads),
    ("losses += [evaluate(average)]", "losses += [evaluate(model)]", check_training),
    ("min(1.0, (step + 1) / 20)", "1.0", check_training),
    ("(step - 1) * batch_size : step * batch_size", "0:batch_size", check_training),
    # the law
    ("self.A / parameters**self.alpha + self.B / tokens**self.beta", "self.A / parameters**self.beta + self.B / tokens**self.alpha", check_law),
    ("left = loss - self.E - self.A", "left = loss - self.A", check_law),
    ("balance * (compute / 6) ** (self.beta / total)", "balance * (compute / 6) ** (self.alpha / total)", check_compute_optimal),
    ("(self.alpha * self.A / (self.beta * self.B))", "(self.beta * self.B / (self.alpha * self.A))", check_compute_optimal),
    ("return parameters, compute / 6 / parameters\n\n\ndef fit", "return parameters, compute / parameters\n\n\ndef fit", check_compute_optimal),
    # the fit
    ("np.minimum(1, delta / np.maximum(np.abs(residual), 1e-300))", "1", check_fit),
    ("delta: float = 1e-3", "delta: float = 1.0", check_fit),
    ("-share[1] * log_n, share[2]", "share[1] * log_n, share[2]", check_fit),
    ("better = new_objective < objective", "better = new_objective > objective", check_fit),
    ("weights=counts[0] * counts[1]", "weights=counts[0] * 0 + 1", check_bootstrap_varies),
    ("(weights * huber).sum(1)", "huber.sum(1)", check_resamples),
    ("pull = weights * np.minimum", "pull = np.minimum", check_resamples),
    ("(counts[i] > 0).sum() >= 3", "(counts[i] > 0).sum() >= 1", check_resamples),
    # published laws
    ("(compute / 8.64e19) ** 0.73", "(compute / 8.64e19) ** 0.27", check_published),
    ("(compute / 8.64e19)", "(compute / 1e15)", check_published),
    ("B=2085.43", "B=410.7", check_published),
    ("return 6 * self.parameters * self.tokens", "return 2 * self.parameters * self.tokens", check_published),
]  # fmt: skip


def test_a_very_small_grid_finds_the_entropy():
    """The whole method in two seconds: the floor of a law fitted to trained models is near the language's entropy."""
    language = scaling.zipf_language(32, seed=0)
    texts, fresh = scaling.sample(language, 2048, 33, seed=1), scaling.sample(language, 128, 33, seed=2)
    widths, reads = (2, 4, 6, 8, 12), [2**14, 2**15, 2**16]
    models = [scaling.tiny_decoder(32, width) for width in widths]
    losses = [
        scaling.train_and_read(model, texts, reads, lambda m: scaling.expected_loss(m, language, fresh))
        for model in models
    ]
    n, d = np.meshgrid([model.num_parameters() for model in models], reads, indexing="ij")
    assert np.all(np.diff(losses, axis=1) < 0), "loss must fall with tokens"
    law = scaling.fit_scaling_law(n, d, losses)
    assert pytest.approx(language.entropy, abs=0.05) == law.E
    assert losses[0][0] > language.entropy + 0.2


@pytest.mark.parametrize(("line", "broken", "check"), MUTATIONS, ids=[f"{i}" for i in range(len(MUTATIONS))])
def test_a_broken_line_is_caught(line, broken, check):
    source = Path(scaling.__file__).read_text(encoding="utf-8")
    assert source.count(line) >= 1, f"{line!r} is no longer in utils/scaling.py: change the mutation with it"
    mutant = types.ModuleType("utils.scaling_mutant")
    sys.modules[mutant.__name__] = mutant  # dataclasses look their module up by name
    try:
        exec(compile(source.replace(line, broken), scaling.__file__, "exec"), mutant.__dict__)  # noqa: S102 a copy of our own source
        with pytest.raises((AssertionError, LabError, ValueError, np.linalg.LinAlgError)):
            check(mutant)
    finally:
        del sys.modules[mutant.__name__]
