"""The PPO engine: the numbers that every implementation must give, and what must hold of a run."""

import math

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
    exact_kl,
    gae,
    kl_estimate,
    masked_mean,
    masked_whiten,
    policy_loss,
    value_loss,
)
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


def make_trainer(model, tokenizer, *, peft=True, reward=count_letters, prompts=PROMPTS, **settings):
    if peft:
        torch.manual_seed(1)
        model = get_peft_model(model, lora_config(model, r=4, dropout=0.1))
    settings = {"steps": 2, "batch_size": 4, "minibatch_size": 2, "micro_batch_size": 1, "max_new_tokens": 6} | settings
    return PPOTrainer(model, reward, tokenizer, prompts, PPOConfig(**{"learning_rate": 1e-2} | settings))


@pytest.mark.parametrize("peft", [True, False])
def test_first_rollout_has_no_kl_and_ratio_one(tiny, peft):
    trainer = make_trainer(*tiny, peft=peft, steps=1, epochs=1, minibatch_size=4)
    (metrics,) = trainer.train()
    assert metrics["objective/kl"] == 0.0  # bit for bit
    assert metrics["val/ratio"] == 1.0
    assert metrics["policy/clipfrac_avg"] == 0.0
    assert metrics["loss/value_avg"] > 0


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
def test_logprobs_are_those_of_the_model_itself(tiny, temperature):
    """Against transformers' own forward pass over one unpadded row, T5's first token included."""
    trainer = make_trainer(*tiny, peft=False, temperature=temperature)
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
    from utils.models import load_model

    model, tokenizer = load_model(tiny_folders["llama"], dtype=torch.float32, device="cpu")
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
    import copy

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

    monkeypatch.setattr("utils.ppo.gae", spy)
    trainer = make_trainer(*tiny, reward=lambda prompts, completions: [7.0] * len(completions), steps=1, kl_coef=0.0)
    trainer.train()
    expected = torch.zeros_like(seen["rewards"])
    expected[torch.arange(4), seen["mask"].sum(1) - 1] = 7.0
    assert torch.equal(seen["rewards"], expected)


def test_columns_reach_the_reward(tiny):
    def reward(prompts, completions, topic):
        assert len(prompts) == len(completions) == len(topic)
        return [float(t == "x") for t in topic]

    rows = [{"prompt": prompt, "topic": "x" if i % 2 else "y"} for i, prompt in enumerate(PROMPTS)]
    (metrics,) = make_trainer(*tiny, reward=reward, prompts=rows, steps=1).train()
    assert metrics["objective/scores"] == 0.5


def test_same_seed_same_run_and_another_seed_another(tiny):
    import copy

    model, tokenizer = tiny
    runs = [make_trainer(copy.deepcopy(model), tokenizer, seed=seed).train() for seed in (3, 3, 4)]
    kept = [[{k: v for k, v in m.items() if not k.startswith("seconds")} for m in run] for run in runs]
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_one_token_optimum(tiny_folders, beta):
    """With completions of one token the optimum is known: reference * exp(r / beta), normalised."""
    from utils.models import load_model

    model, tokenizer = load_model(tiny_folders["llama"], dtype=torch.float32, device="cpu")
    values = torch.linspace(-1, 1, len(tokenizer))

    def reward(prompts, completions):
        return [float(values[tokenizer.convert_tokens_to_ids(text)]) if text else 0.0 for text in completions]

    values[[0, 1, 2, 3]] = 0.0  # special tokens decode to nothing
    prompt = "the cat sat"
    with torch.no_grad():
        ref_logprobs = model(torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1].log_softmax(-1)
    optimum = (ref_logprobs + values / beta).log_softmax(-1)
    best = beta * float(torch.logsumexp(ref_logprobs + values / beta, -1))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)  # enough to reach any distribution after one prompt
    trainer = make_trainer(
        model, tokenizer, peft=False, reward=reward, prompts=[prompt], steps=60, batch_size=256, minibatch_size=256,
        micro_batch_size=256, epochs=4, max_new_tokens=1, kl_coef=beta, learning_rate=4e-3,
    )  # fmt: skip
    trainer.train()
    with torch.no_grad():
        logprobs = model(torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1].log_softmax(-1)
    objective = float((logprobs.exp() * values).sum() - beta * exact_kl(logprobs, ref_logprobs))
    start = float((ref_logprobs.exp() * values).sum())
    assert objective - start > 0.97 * (best - start)
    assert float(exact_kl(logprobs, optimum)) < 0.03 * float(exact_kl(ref_logprobs, optimum))


def test_resume_is_bitwise(tiny, tmp_path):
    import copy

    model, tokenizer = tiny
    settings = dict(steps=4, kl_target=1.0, kl_horizon=50)
    whole = make_trainer(copy.deepcopy(model), tokenizer, **settings, output_dir=str(tmp_path), save_steps=2)
    whole.train()
    resumed = make_trainer(copy.deepcopy(model), tokenizer, **settings)
    resumed.train(resume_from=tmp_path / "step-2")
    for name, parameter in whole.trainable.items():
        assert torch.equal(parameter, resumed.trainable[name]), name
    assert torch.equal(whole.value_head.weight, resumed.value_head.weight)
    assert whole.kl_controller.value == resumed.kl_controller.value
    assert len(resumed.history) == 4
    with pytest.raises(PPOError, match="not a checkpoint"):
        resumed.load_checkpoint(tmp_path)


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
        parameter.data *= {"llama": 8.0, "gpt2": 4.0, "t5": 0.5}[model.config.model_type]  # neither uniform nor certain
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


def test_a_reward_that_is_not_finite_stops_the_run(tiny):
    with pytest.raises(PPOError, match="Step 0"):
        make_trainer(*tiny, reward=lambda prompts, completions: [math.nan] * len(completions)).train()
    with pytest.raises(PPOError, match="1 numbers for 4"):
        make_trainer(*tiny, reward=lambda prompts, completions: [1.0]).train()


def test_kl_that_explodes_stops_the_run_with_advice(tiny):
    with pytest.raises(PPOError, match=r"Step 1.*lower learning_rate"):
        make_trainer(*tiny, max_kl=1e-6, learning_rate=0.1).train()


def test_sizes_that_do_not_fit_and_no_prompts(tiny):
    with pytest.raises(LabError, match="multiple"):
        make_trainer(*tiny, batch_size=4, minibatch_size=3)
    with pytest.raises(LabError, match="at least one prompt"):
        make_trainer(*tiny, prompts=[])
