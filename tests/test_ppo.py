"""The PPO engine: the numbers that every implementation must give, and what must hold of a run."""

import copy
import math
import random
import sys
import types

import pytest
import torch
from peft import get_peft_model

from utils.lab import LabError
from utils.ppo import (
    AdaptiveKLController,
    FixedKLController,
    PPOConfig,
    PPOError,
    PPOTrainer,
    RunningMoments,
    exact_kl,
    gae,
    kl_estimate,
    masked_mean,
    masked_whiten,
    policy_loss,
    value_loss,
)
from utils.ppo_run import METRICS
from utils.training import lora_config

P, Q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.05, 0.475, 0.475])
PROMPTS = ["the cat sat on the mat", "a dog ran", "person1 asks person2 to ran to the red house and the river", "big"]


# --- numbers -----------------------------------------------------------------------------------------------------


def test_kl_estimates_have_the_known_expectations():
    expectation = {kind: float((P * kl_estimate(P.log(), Q.log(), kind)).sum()) for kind in ("k1", "k2", "k3")}
    assert expectation["k1"] == pytest.approx(0.830366, abs=1e-6)
    assert expectation["k2"] == pytest.approx(1.428469, abs=1e-6)
    assert expectation["k3"] == pytest.approx(0.830366, abs=1e-6)
    assert float(exact_kl(P.log(), Q.log())) == pytest.approx(0.830366, abs=1e-6)
    with pytest.raises(ValueError, match="k9"):
        kl_estimate(P, Q, "k9")


def test_exact_kl_allows_for_a_token_the_policy_never_takes():
    assert float(exact_kl(torch.tensor([0.0, -math.inf]), torch.tensor([0.0, 0.0]))) == pytest.approx(math.log(2))


def test_sampling_from_another_distribution_makes_the_estimate_negative():
    sampled = torch.tensor([0.0, 0.5, 0.5])  # token 0 banned
    assert float((sampled * kl_estimate(P.log(), Q.log())).sum()) == pytest.approx(-0.641854, abs=1e-6)


@pytest.mark.parametrize(("kl", "expected"), [(12, 0.201024), (6.6, 0.200512), (0, 0.198976)])
def test_adaptive_coefficient(kl, expected):
    controller = AdaptiveKLController(0.2, target=6, horizon=10_000)
    controller.update(kl, 256)
    assert controller.value == pytest.approx(expected, abs=1e-9)


def test_fixed_coefficient_stays():
    controller = FixedKLController(0.2)
    controller.update(100.0, 256)
    assert controller.value == 0.2


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.full((1, 3), 0.5)
    advantages, returns = gae(rewards, values, torch.ones(1, 3), 1.0, 0.95)
    torch.testing.assert_close(advantages, torch.tensor([[0.45125, 0.475, 0.5]]))
    torch.testing.assert_close(returns, torch.tensor([[0.95125, 0.975, 1.0]]))


def test_gae_ignores_padding_and_what_stands_in_it():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.full((1, 3), 0.5)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    garbage = torch.full((1, 2), 1e6)
    padded = gae(torch.cat([rewards, garbage], 1), torch.cat([values, garbage], 1), mask, 1.0, 0.95)
    for got, wanted in zip(padded, gae(rewards, values, torch.ones(1, 3), 1.0, 0.95), strict=True):
        assert torch.equal(got[:, :3], wanted)
        assert torch.equal(got[:, 3:], torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "has_gradient"),
    [(1.0, 1.5, -1.2, False), (-1.0, 1.5, 1.5, True), (1.0, 0.5, -0.5, True), (-1.0, 0.5, 0.8, False)],
)
def test_ratio_clip(advantage, ratio, loss, has_gradient):
    logprobs = torch.tensor(math.log(ratio), requires_grad=True)
    result = policy_loss(logprobs, torch.tensor(0.0), torch.tensor(advantage), 0.2)
    result.backward()
    assert float(result.detach()) == pytest.approx(loss)
    assert (logprobs.grad != 0) == has_gradient


def test_value_clip():
    values = torch.tensor(1.0, requires_grad=True)
    loss = value_loss(values, torch.tensor(0.0), torch.tensor(2.0), 0.2)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1.62)
    assert values.grad == 0


def test_masked_functions_ignore_what_is_masked():
    x, mask = torch.tensor([1.0, 2.0, 3.0, 1e6, math.nan]), torch.tensor([1, 1, 1, 0, 0])
    assert float(masked_mean(x, mask)) == pytest.approx(2.0)
    whitened = masked_whiten(x, mask)
    assert float(whitened[:3].mean()) == pytest.approx(0, abs=1e-6)
    assert float(whitened[:3].var(unbiased=False)) == pytest.approx(1, rel=1e-5)
    assert torch.equal(whitened[3:], torch.zeros(2))
    assert float(masked_whiten(x, mask, shift_mean=False)[:3].mean()) == pytest.approx(2.0, rel=1e-5)


# --- what must hold of a run -------------------------------------------------------------------------------------


def count_letters(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def load(folder):
    """A tiny model fresh from its folder. T5's is sure of one token at each place: made less so, or no two samples differ."""
    from utils.models import load_model

    model, tokenizer = load_model(folder, dtype=torch.float32, device="cpu")
    if model.config.model_type == "t5":
        model.get_output_embeddings().weight.data *= 0.1
    return model, tokenizer


@pytest.fixture(params=["llama", "gpt2", "t5"])
def tiny(request, tiny_folders):
    return load(tiny_folders[request.param])


@pytest.fixture
def llama(tiny_folders):
    """For what is the same for every model."""
    return load(tiny_folders["llama"])


def make_trainer(model, tokenizer, *, peft=True, reward=count_letters, prompts=PROMPTS, **settings):
    if peft:
        torch.manual_seed(1)
        model = get_peft_model(model, lora_config(model, r=4, dropout=0.1))
    settings = {"steps": 2, "batch_size": 4, "minibatch_size": 2, "micro_batch_size": 1, "max_new_tokens": 6} | settings
    return PPOTrainer(model, reward, tokenizer, prompts, PPOConfig(**{"learning_rate": 1e-2} | settings))


@pytest.mark.parametrize("peft", [True, False])
def test_first_rollout_has_no_kl_and_ratio_one(tiny, peft):
    trainer = make_trainer(*tiny, peft=peft, epochs=1, minibatch_size=4)
    metrics, second = trainer.train()
    assert metrics["objective/kl"] == 0.0  # bit for bit
    assert metrics["val/ratio"] == 1.0
    assert metrics["policy/clipfrac_avg"] == 0.0
    assert metrics["loss/value_avg"] > 0
    assert second["objective/kl"] != 0.0
    assert second["val/ratio"] == 1.0  # also when the adapter, its dropout and the values have begun to count


def test_kept_graphs_change_nothing(tiny):
    """Two minibatches of two micro-batches: one graph is kept, both of the first, and no more where more are asked for."""
    settings = dict(batch_size=8, prompts=PROMPTS * 2, minibatch_size=4, micro_batch_size=2, rollout_batch_size=4)
    found = []
    for keep in (0, 1, 2, 9):
        trainer = make_trainer(copy.deepcopy(tiny[0]), tiny[1], keep_graphs=keep, **settings)
        rollout = trainer.rollout(trainer.rows[:8])
        assert [list(rows) for rows in rollout.graphs] == rollout.micro_batches[0][:keep]
        assert all(made[0].requires_grad for made in rollout.graphs.values())
        history = [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in trainer.train()]
        found.append((history, [parameter.tolist() for parameter in trainer.parameters]))
    assert found[0] == found[1] == found[2] == found[3]  # bit for bit


def test_values_are_zero_at_first(tiny):
    trainer = make_trainer(*tiny)
    assert torch.equal(trainer.rollout(PROMPTS).values, torch.zeros_like(trainer.rollout(PROMPTS).values))


def test_optimizer_steps_are_epochs_times_minibatches(tiny):
    trainer = make_trainer(*tiny, epochs=3)
    history = trainer.train()
    assert [metrics["optimizer_steps"] for metrics in history] == [6, 12]


def test_a_row_alone_and_in_a_padded_batch_has_the_same_logprobs(tiny):
    trainer = make_trainer(*tiny)
    trainer.train()  # so that policy, reference and values differ
    rollout = trainer.rollout(PROMPTS)
    together = trainer._forward(trainer.model, rollout, [0, 1, 2, 3])
    for row in range(4):
        alone = trainer._forward(trainer.model, rollout, [row])
        width = alone[0].shape[1]
        for batch, single in zip(together, alone, strict=True):
            torch.testing.assert_close(batch[row : row + 1, :width], single, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("peft", [True, False])
def test_logprobs_are_those_of_the_model_itself(tiny, temperature, peft):
    """Against transformers' own forward pass over one unpadded row, T5's first token included."""
    trainer = make_trainer(*tiny, peft=peft, temperature=temperature)
    rollout = trainer.rollout(PROMPTS)
    for row in range(4):
        prompt, answer = rollout.prompt_ids[row], rollout.completions[row].token_ids
        if trainer.model.config.is_encoder_decoder:
            logits = trainer.model(
                input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *answer[:-1]]])
            ).logits[0]
        else:
            logits = trainer.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(rollout.logprobs[row, : len(answer)], expected, atol=1e-5, rtol=1e-5)
        assert bool(rollout.mask[row, : len(answer)].all())
        assert not rollout.mask[row, len(answer) :].any()


def test_the_eos_step_is_trained_although_padding_is_eos(tiny_folders):
    model, tokenizer = load(tiny_folders["llama"])
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    with torch.no_grad():
        model.lm_head.weight[2] += 2.0  # makes EOS likely
    rollout = make_trainer(model, tokenizer, max_new_tokens=30).rollout(PROMPTS * 4)
    ended = [i for i, completion in enumerate(rollout.completions) if not completion.truncated]
    assert ended
    for i in ended:
        assert rollout.completions[i].token_ids[-1] == 2
        assert int(rollout.mask[i].sum()) == len(rollout.completions[i].token_ids)
    assert any(completion.truncated for completion in rollout.completions) or len(ended) == 16


@pytest.mark.parametrize("micro_batch_size", [2, 4, 8])
def test_gradient_does_not_depend_on_micro_batches(tiny, micro_batch_size):

    model, tokenizer = tiny
    results = []
    for size in (1, micro_batch_size):
        trainer = make_trainer(
            copy.deepcopy(model), tokenizer, prompts=PROMPTS * 2, batch_size=8, minibatch_size=8, micro_batch_size=size,
            steps=1, epochs=1, learning_rate=1e-3,
        )  # fmt: skip
        trainer.train()
        results.append((trainer.history[0]["grad_norm"], [p.detach().clone() for p in trainer.trainable.values()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for one, several in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, several, atol=2e-4, rtol=1e-3)


def test_reference_never_changes_and_the_adapter_is_on_again(tiny):
    trainer = make_trainer(*tiny)
    rollout = trainer.rollout(PROMPTS)
    rows = [0, 1, 2, 3]

    def reference():
        with trainer._reference_model() as model, torch.no_grad():
            return trainer._forward(model, rollout, rows)[0]

    before, policy_before = reference(), trainer._forward(trainer.model, rollout, rows)[0].detach()
    trainer.train()
    assert torch.equal(reference(), before)
    assert not torch.equal(trainer._forward(trainer.model, rollout, rows)[0], policy_before)
    with pytest.raises(RuntimeError), trainer._reference_model():
        raise RuntimeError
    assert not torch.equal(trainer._forward(trainer.model, rollout, rows)[0], before)


def test_the_reference_is_apart_from_a_plain_policy(tiny):
    trainer = make_trainer(*tiny, peft=False)
    trainer.train()
    rollout = trainer.rollout(PROMPTS)
    assert not torch.equal(rollout.logprobs, rollout.ref_logprobs)


def test_each_step_draws_anew(tiny):
    trainer = make_trainer(*tiny, prompts=PROMPTS[:1], batch_size=4, learning_rate=0.0, max_new_tokens=12)
    trainer.train()
    assert trainer.history[0]["objective/entropy"] != trainer.history[1]["objective/entropy"]


@pytest.mark.parametrize("peft", [True, False])
def test_several_completions_a_prompt_are_scored_as_rows_alone_are(tiny, peft):
    trainer = make_trainer(*tiny, peft=peft, num_completions=3, minibatch_size=6, micro_batch_size=6)
    first = trainer.rollout(PROMPTS * 4).completions
    assert any(len({tuple(completion.token_ids) for completion in first[i : i + 3]}) > 1 for i in range(0, 48, 3))
    history = trainer.train()
    assert history[0]["objective/kl"] == 0.0
    assert history[0]["optimizer_steps"] == 4
    rollout = trainer.rollout(PROMPTS)
    assert [rollout.prompts[row] for row in (0, 2, 3, 11)] == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[3]]
    for row in range(12):
        alone = trainer._forward(trainer.model, rollout, [row])[0][0].detach()
        torch.testing.assert_close(rollout.logprobs[row, : len(alone)], alone, atol=1e-5, rtol=1e-5)


def test_score_stands_on_the_last_real_token(tiny, monkeypatch):
    seen = {}

    def spy(rewards, values, mask, gamma, lam):
        seen.update(rewards=rewards.clone(), mask=mask)
        return gae(rewards, values, mask, gamma, lam)

    monkeypatch.setattr(sys.modules[PPOTrainer.__module__], "gae", spy)
    tokens = {"max_new_tokens": 30, "prompts": PROMPTS * 4, "batch_size": 16}
    make_trainer(*tiny, reward=lambda prompts, completions: [7.0] * 16, steps=1, kl_coef=0.0, **tokens).train()
    lengths = seen["mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
    expected = torch.zeros_like(seen["rewards"])
    expected[torch.arange(16), lengths - 1] = 7.0
    assert torch.equal(seen["rewards"], expected)


def test_columns_reach_the_reward(llama):
    def reward(prompts, completions, topic):
        assert len(prompts) == len(completions) == len(topic)
        return [float(t == "x") for t in topic]

    rows = [{"prompt": prompt, "topic": "x" if i % 2 else "y"} for i, prompt in enumerate(PROMPTS)]
    (metrics,) = make_trainer(*llama, reward=reward, prompts=rows, steps=1).train()
    assert metrics["objective/scores"] == 0.5


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
def test_same_seed_same_run_and_another_seed_another(tiny, prompts):

    model, tokenizer = tiny
    runs = [make_trainer(copy.deepcopy(model), tokenizer, prompts=prompts, seed=seed).train() for seed in (3, 3, 4)]
    kept = [without_seconds(run) for run in runs]
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_one_token_optimum(tiny_folders, kind, beta):
    """With completions of one token the optimum is known: reference * exp(r / beta), normalised."""
    from utils.models import load_model

    model, tokenizer = load_model(tiny_folders[kind], dtype=torch.float32, device="cpu")
    head = model.get_output_embeddings()
    head.weight.data *= {"llama": 1.0, "t5": 0.1}[
        kind
    ]  # T5's start is so sure of one token that others are never drawn
    values = torch.linspace(-1, 1, len(tokenizer))
    values[[0, 1, 2, 3]] = 0.0  # special tokens decode to nothing

    def reward(prompts, completions):
        return [float(values[tokenizer.convert_tokens_to_ids(text)]) if text else 0.0 for text in completions]

    prompt = "the cat sat"

    def distribution():
        ids = torch.tensor([tokenizer(prompt).input_ids])
        extra = {"decoder_input_ids": torch.tensor([[0]])} if kind == "t5" else {}
        with torch.no_grad():
            return model(ids, **extra).logits[0, -1].log_softmax(-1)

    ref_logprobs = distribution()
    optimum = (ref_logprobs + values / beta).log_softmax(-1)
    best = beta * float(torch.logsumexp(ref_logprobs + values / beta, -1))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    head.weight.requires_grad_(True)  # enough to reach any distribution after one prompt
    trainer = make_trainer(
        model, tokenizer, peft=False, reward=reward, prompts=[prompt], steps=45, batch_size=256, minibatch_size=256,
        rollout_batch_size=256, micro_batch_size=256, epochs=4, max_new_tokens=1, kl_coef=beta, learning_rate=5e-3,
    )  # fmt: skip
    trainer.train()
    logprobs = distribution()
    objective = float((logprobs.exp() * values).sum() - beta * exact_kl(logprobs, ref_logprobs))
    start = float((ref_logprobs.exp() * values).sum())
    assert objective - start > 0.97 * (best - start)
    assert float(exact_kl(logprobs, optimum)) < 0.03 * float(exact_kl(ref_logprobs, optimum))
    # Within what a rollout of 256 can tell: three standard errors of its mean score, under the optimum
    mean = float((optimum.exp() * values).sum())
    error = float(((optimum.exp() * (values - mean) ** 2).sum() / 256) ** 0.5)
    assert float((logprobs.exp() * values).sum()) == pytest.approx(mean, abs=3 * error)


def test_resume_is_bitwise(tiny, tmp_path):

    model, tokenizer = tiny
    settings = dict(steps=4, kl_target=1.0, kl_horizon=50, keep_checkpoints=2)
    whole = make_trainer(copy.deepcopy(model), tokenizer, **settings, output_dir=str(tmp_path), save_steps=2)
    whole.train()
    resumed = make_trainer(copy.deepcopy(model), tokenizer, **settings)
    resumed.train(resume_from=tmp_path / "step-2")
    for name, parameter in whole.trainable.items():
        assert torch.equal(parameter, resumed.trainable[name]), name
    assert torch.equal(whole.value_head.weight, resumed.value_head.weight)
    assert whole.kl_controller.value == resumed.kl_controller.value
    assert len(resumed.history) == 4
    assert whole.moments.std == resumed.moments.std
    with pytest.raises(PPOError, match="not a checkpoint"):
        resumed.load_checkpoint(tmp_path)


def test_a_resumed_run_draws_the_reward_s_random_numbers_where_it_left_off(llama, tmp_path):

    model, tokenizer = llama

    def noisy(prompts, completions):
        return [random.random() + float(torch.randn(())) for _ in completions]

    settings = dict(steps=4, reward=noisy, scale_scores=True, keep_checkpoints=4)
    random.seed(5)
    whole = make_trainer(copy.deepcopy(model), tokenizer, **settings, output_dir=str(tmp_path))
    whole.train()
    random.seed(99)
    resumed = make_trainer(copy.deepcopy(model), tokenizer, **settings)
    resumed.train(resume_from=tmp_path / "step-3")
    assert without_seconds(resumed.history) == without_seconds(whole.history)
    assert all(torch.equal(p, resumed.trainable[name]) for name, p in whole.trainable.items())


def test_a_checkpoint_of_another_run_is_refused_and_names_what_differs(llama, tmp_path):

    model, tokenizer = llama
    make_trainer(copy.deepcopy(model), tokenizer, steps=1, output_dir=str(tmp_path)).train()
    for change, message in (
        ({"kl_coef": 0.5}, r"kl_coef \(0.05 there, 0.5 here\)"),
        ({"prompts": PROMPTS[::-1]}, "prompts"),
        ({"steps": 3}, r"steps \(1 there, 3 here\)"),
        ({"peft": False}, "the weights that are trained"),
    ):
        other = make_trainer(copy.deepcopy(model), tokenizer, **{"steps": 1} | change)
        before = [p.detach().clone() for p in other.parameters]
        with pytest.raises(PPOError, match=message):
            other.load_checkpoint(tmp_path / "step-1")
        assert all(torch.equal(a, b) for a, b in zip(before, other.parameters, strict=True))
        assert other.step == 0


def test_a_run_goes_on_from_the_last_whole_checkpoint_and_never_over_an_earlier_run(llama, tmp_path):

    model, tokenizer = llama
    settings = dict(steps=3, lr_scheduler_type="constant", output_dir=str(tmp_path))
    first = make_trainer(copy.deepcopy(model), tokenizer, **settings | {"steps": 2})
    first.train(resume_from="last")  # none yet: from the start
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["metrics.csv", "step-2"]
    (tmp_path / ".step-9-abc" / "new").mkdir(parents=True)  # what a killed process was writing
    with pytest.raises(PPOError, match="earlier run"):
        make_trainer(copy.deepcopy(model), tokenizer, **settings).train()
    second = make_trainer(copy.deepcopy(model), tokenizer, **settings)
    history = second.train(resume_from="last")
    assert without_seconds(history[:2]) == without_seconds(first.history)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["metrics.csv", "step-3"]
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "1", "2", "3"]
    assert set(lines[0].split(",")) == {"step", *history[0]}


@pytest.mark.parametrize("moment", ["rollout", "reward", "update"])
def test_an_interrupt_loses_the_step_in_progress_and_no_more(llama, tmp_path, capsys, monkeypatch, moment):
    """Ctrl-C, then `train(resume_from="last")` with the very trainer, gradients half there and all."""

    model, tokenizer = llama
    whole = make_trainer(copy.deepcopy(model), tokenizer, steps=3)
    whole.train()
    trainer = make_trainer(copy.deepcopy(model), tokenizer, steps=3, output_dir=str(tmp_path))
    calls = {"left": {"rollout": 1, "reward": 1, "update": 11}[moment]}
    owner, name = {"rollout": (trainer, "_sample"), "reward": (trainer, "reward"), "update": (trainer, "_backward")}[
        moment
    ]
    original = getattr(owner, name)

    def interrupted(*args, **kwargs):
        result = original(*args, **kwargs)
        if calls["left"] == 0:
            calls["left"] = -1
            raise KeyboardInterrupt
        calls["left"] -= 1
        return result

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    step = trainer.step
    said = capsys.readouterr().out
    assert step == 1
    assert "Stopped in step 1." in said
    assert "step-1" in said
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step-1"]
    trainer.train(resume_from="last")
    assert without_seconds(trainer.history) == without_seconds(whole.history)
    assert all(torch.equal(p, trainer.trainable[name]) for name, p in whole.trainable.items())


def test_a_full_disk_is_told_and_loses_nothing(llama, tmp_path, monkeypatch):

    model, tokenizer = llama
    whole = make_trainer(copy.deepcopy(model), tokenizer, steps=3)
    whole.train()
    trainer = make_trainer(copy.deepcopy(model), tokenizer, steps=3, output_dir=str(tmp_path))
    from utils import ppo_run

    original = ppo_run.save_file

    def full(tensors, path):
        if trainer.step == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(ppo_run, "save_file", full)
        with pytest.raises(
            PPOError, match=r"step-2 cannot be written .*No space left.*last whole checkpoint is .*step-1"
        ):
            trainer.train()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step-1"]
    trainer.train()
    assert without_seconds(trainer.history) == without_seconds(whole.history)


# --- policies, rewards, settings ---------------------------------------------------------------------------------


def without_seconds(history):
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in history]


def with_sft_adapter(model, *, stacked):
    """A policy and its frozen SFT adapter: below a fresh one, or as a copy of the one that is trained."""
    torch.manual_seed(3)
    policy = get_peft_model(model, lora_config(model, r=4), adapter_name="reference")
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    policy.add_adapter("policy", lora_config(model, r=4))
    if not stacked:
        own = dict(policy.named_parameters())
        for name, parameter in own.items():
            if ".policy." in name:
                parameter.data.copy_(own[name.replace(".policy.", ".reference.")])
    policy.base_model.set_adapter(["reference", "policy"] if stacked else ["policy"])
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(".policy." in name)
    return policy


@pytest.mark.parametrize("stacked", [True, False])
def test_a_frozen_adapter_is_the_reference(tiny, stacked):
    model, tokenizer = tiny
    policy = with_sft_adapter(model, stacked=stacked)
    trainer = make_trainer(policy, tokenizer, peft=False)
    assert trainer.reference is None
    rollout = trainer.rollout(PROMPTS)
    rows = [0, 1, 2, 3]
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}

    def reference():
        with trainer._reference_model() as reference_model, torch.no_grad():
            return trainer._forward(reference_model, rollout, rows)[0]

    with policy.disable_adapter(), torch.no_grad():
        base = trainer._forward(policy, rollout, rows)[0]
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(".policy." in name)  # PEFT's own context turns more of them on
    expected, active = reference(), list(policy.active_adapters)
    assert not torch.allclose(expected, base)
    (first, *_) = trainer.train()
    assert first["objective/kl"] == 0.0
    assert torch.equal(reference(), expected)
    assert policy.active_adapters == active
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad == (".policy." in name), name
        assert parameter.requires_grad or torch.equal(parameter, before[name]), name
    assert any(not torch.equal(p, before[name]) for name, p in policy.named_parameters())


def test_several_frozen_adapters_need_a_name_and_learned_prompts_are_refused(tiny):
    from peft import PromptTuningConfig

    from utils.training import task_type

    model, tokenizer = tiny
    policy = get_peft_model(model, lora_config(model, r=2))
    for name in ("first", "second"):
        policy.add_adapter(name, lora_config(model, r=2))
    with pytest.raises(LabError, match=r"first, second.*'reference'"):
        make_trainer(policy, tokenizer, peft=False)
    policy.add_adapter("reference", lora_config(model, r=2))
    assert make_trainer(policy, tokenizer, peft=False).reference_adapter == "reference"
    prompt = PromptTuningConfig(task_type=task_type(model), num_virtual_tokens=2)
    with pytest.raises(LabError, match="learned prompt"):
        make_trainer(get_peft_model(policy.unload(), prompt), tokenizer, peft=False)


def test_an_adapter_on_the_head_is_scored_too(tiny_folders):
    model, tokenizer = load(tiny_folders["llama"])
    policy = get_peft_model(
        model, lora_config(model, r=2).__class__(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    )
    torch.nn.init.normal_(policy.base_model.model.lm_head.lora_B["default"].weight)
    rollout = make_trainer(policy, tokenizer, peft=False).rollout(PROMPTS)
    prompt, answer = rollout.prompt_ids[0], rollout.completions[0].token_ids
    with torch.no_grad():
        logits = policy(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
    torch.testing.assert_close(rollout.logprobs[0, : len(answer)], expected, atol=1e-5, rtol=1e-5)


def test_chat_prompts_and_a_preference_model_with_its_own_tokenizer(tiny, tiny_folders):
    from utils.models import load_model
    from utils.rewards import PreferenceModel

    reward = PreferenceModel(*load_model(tiny_folders["bert"], dtype=torch.float32, device="cpu", num_labels=1))
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    trainer = make_trainer(*tiny, reward=reward, prompts=prompts)
    history = trainer.train()
    assert history[0]["objective/kl"] == 0.0
    rollout = trainer.rollout(prompts)
    assert trainer.score(rollout).tolist() == pytest.approx(reward(PROMPTS, rollout.texts))
    if trainer.tokenizer.chat_template:
        assert "summary" in trainer.tokenizer.decode(rollout.prompt_ids[0])


def test_an_update_stops_where_the_policy_has_moved_past_target_kl(tiny):

    model, tokenizer = tiny
    settings = dict(steps=1, epochs=6, learning_rate=3e-2)
    (free,) = make_trainer(copy.deepcopy(model), tokenizer, **settings).train()
    (held,) = make_trainer(copy.deepcopy(model), tokenizer, **settings, target_kl=1e-4).train()
    assert free["optimizer_steps"] == 12
    assert 1 <= held["optimizer_steps"] < 12
    assert held["policy/approxkl_avg"] < free["policy/approxkl_avg"]


def test_moments_of_batches_are_those_of_all_scores():
    scores = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0])
    moments = RunningMoments()
    assert moments.std == 1.0
    for batch in scores.split([2, 1, 4]):
        moments.update(batch)
    assert moments.mean == pytest.approx(float(scores.mean()))
    assert moments.std == pytest.approx(float(scores.std(unbiased=False)))


def test_scores_are_scaled_by_their_running_deviation_where_wanted(tiny):
    trainer = make_trainer(*tiny, steps=1, kl_coef=0.0, scale_scores=True)
    (metrics,) = trainer.train()
    assert metrics["objective/scores_running_mean"] == pytest.approx(metrics["objective/scores"])
    assert metrics["objective/rlhf_reward"] == pytest.approx(metrics["objective/scores"] / trainer.moments.std)
    (plain,) = make_trainer(*tiny, peft=False, steps=1, kl_coef=0.0).train()
    assert plain["objective/rlhf_reward"] == pytest.approx(plain["objective/scores"])


def test_a_completion_that_was_cut_off_pays_the_penalty(llama):
    trainer = make_trainer(
        *llama, missing_eos_penalty=100.0, reward=lambda prompts, completions: [1.0] * len(completions)
    )
    rollout = trainer.rollout(PROMPTS * 4)
    truncated = torch.tensor([completion.truncated for completion in rollout.completions])
    assert truncated.any()
    assert torch.equal(trainer.score(rollout), 1.0 - 100.0 * truncated)


def test_the_metrics_have_trl_s_names_and_units(tiny):
    trainer = make_trainer(*tiny, learning_rate=3e-2)
    trainer.train()
    rollout = trainer.rollout(PROMPTS)
    trainer.score(rollout)
    metrics = trainer.update(rollout)
    sequences = torch.where(rollout.mask, rollout.logprobs - rollout.ref_logprobs, 0.0).sum(1)
    assert metrics["objective/kl"] == pytest.approx(float(sequences.mean()), rel=1e-5)
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.05 * float(sequences.mean()), rel=1e-5)
    assert metrics["objective/entropy"] == pytest.approx(-float(rollout.logprobs[rollout.mask].sum()) / 4, rel=1e-5)
    assert metrics["response/length_mean"] == pytest.approx(float(rollout.mask.sum()) / 4)
    assert metrics["val/num_eos_tokens"] == 4 - 4 * metrics["response/truncated_frac"]
    expected = {
        *(f"objective/{n}" for n in ("kl", "kl_coef", "entropy", "scores", "rlhf_reward", "non_score_reward")),
        *(f"policy/{n}_avg" for n in ("approxkl", "clipfrac", "entropy")),
        *("loss/policy_avg", "loss/value_avg", "val/ratio", "val/clipfrac_avg", "val/num_eos_tokens"),
        *("val/explained_variance", "response/length_mean", "response/truncated_frac", "grad_norm", "optimizer_steps"),
    }
    assert expected <= set(metrics)
    assert {"seconds/rollout", "seconds/score", "seconds/update"} <= set(trainer.history[0])
    assert set(METRICS) == set(trainer.history[0]), "a metric that is logged has no explanation, or the reverse"


def test_tensorboard_gets_every_number_and_is_asked_for_where_it_is_missing(llama, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, tokenizer = llama
    settings = dict(report_to="tensorboard", output_dir=str(tmp_path))
    history = make_trainer(copy.deepcopy(model), tokenizer, **settings).train()
    written = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(written.Tags()["scalars"]) == set(METRICS)
    for name in METRICS:
        found = [(event.step, event.value) for event in written.Scalars(name)]
        assert found == [(i, pytest.approx(row[name], rel=1e-6)) for i, row in enumerate(history, 1)]  # kept in float32
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(LabError, match="pip install tensorboard"):
        make_trainer(copy.deepcopy(model), tokenizer, **settings)
    with pytest.raises(LabError, match="output_dir"):
        make_trainer(copy.deepcopy(model), tokenizer, report_to="tensorboard")


@pytest.mark.parametrize("nobody", [True, False])
def test_a_figure_follows_the_run_and_is_drawn_once_when_nobody_watches(llama, monkeypatch, nobody):
    from utils.plots import live_ppo_curves

    shown, updates = [], []
    handle = types.SimpleNamespace(update=updates.append)

    def display(image, display_id):
        shown.append(image)
        return handle if display_id else None

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr("utils.lab.headless", lambda: nobody)
    monkeypatch.setattr("utils.ppo.progress", lambda **_: pytest.importorskip("tqdm").tqdm(disable=True))
    make_trainer(*llama, steps=3).train(on_step=live_ppo_curves(3, kl_target=1.0))
    assert (len(shown), len(updates)) == ((1, 0) if nobody else (1, 2))
    assert "Step 3 of 3" in (shown if nobody else updates)[-1].alt


# --- errors ------------------------------------------------------------------------------------------------------


def test_a_setting_that_changes_the_sampled_distribution_is_refused(tiny):
    with pytest.raises(LabError, match=r"temperature=0.7.*set PPOConfig.temperature"):
        make_trainer(*tiny, generation_kwargs={"temperature": 0.7})
    with pytest.raises(LabError, match="top_k=5"):
        make_trainer(*tiny, generation_kwargs={"top_k": 5})


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_come_from_the_distribution_that_is_scored(tiny, temperature):
    """Over many samples of one token, -log p averages to the entropy of the scored distribution."""
    model, tokenizer = tiny
    for parameter in model.get_output_embeddings().parameters():
        parameter.data *= {"llama": 8.0, "gpt2": 4.0, "t5": 4.0}[model.config.model_type]  # neither uniform nor certain
    trainer = make_trainer(
        model, tokenizer, peft=False, temperature=temperature, max_new_tokens=1, num_completions=2000,
        batch_size=1, minibatch_size=2000, micro_batch_size=2000,
    )  # fmt: skip
    torch.manual_seed(0)
    rollout = trainer.rollout([PROMPTS[0]])
    entropy = float(trainer._forward(trainer.model, rollout, [0])[2].detach())
    surprise = -rollout.logprobs[:, 0]
    assert float(surprise.mean()) == pytest.approx(entropy, abs=4 * float(surprise.std()) / 2000**0.5)


def test_a_penalty_saved_with_the_model_does_not_leak_into_rollouts(tiny):
    model, tokenizer = tiny
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.top_k = 1
    rollout = make_trainer(model, tokenizer, max_new_tokens=20).rollout(["the"] * 8)
    assert len({tuple(completion.token_ids) for completion in rollout.completions}) > 1
    assert model.generation_config.repetition_penalty == 50.0


def test_a_reward_that_is_not_finite_stops_the_run(llama):
    with pytest.raises(PPOError, match="Step 0"):
        make_trainer(*llama, reward=lambda prompts, completions: [math.nan] * len(completions)).train()
    with pytest.raises(PPOError, match="1 numbers for 4"):
        make_trainer(*llama, reward=lambda prompts, completions: [1.0]).train()


def test_kl_that_explodes_stops_the_run_with_advice(tiny):
    with pytest.raises(PPOError, match=r"Step 1.*lower learning_rate"):
        make_trainer(*tiny, max_kl=1e-6, learning_rate=0.1).train()


def test_sizes_that_do_not_fit_and_no_prompts(llama):
    with pytest.raises(LabError, match="multiple"):
        make_trainer(*llama, batch_size=4, minibatch_size=3)
    with pytest.raises(LabError, match="at least one prompt"):
        make_trainer(*llama, prompts=[])


def test_processes_that_accelerate_does_not_know_of_are_not_left_to_train_alone(llama, monkeypatch):
    make_trainer(*llama)  # accelerate is set up for one process from here on
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LabError, match=r"2 processes were started, but accelerate was set up for 1"):
        make_trainer(*llama, peft=False)
