"""Would the tests of the PPO engine notice? Those of `test_ppo.py` are run against copies of the module with one line broken."""

from itertools import product

import pytest
import test_ppo
from conftest import broken_copy

from utils import ppo

NAMES = (
    *("AdaptiveKLController", "FixedKLController", "PPOConfig", "PPOError", "PPOTrainer", "RunningMoments", "exact_kl"),
    *("gae", "kl_estimate", "masked_mean", "masked_whiten", "policy_loss", "value_loss"),
)

# what is broken: what stands in the source, what is put there, the test that notices, and on which model (None: on none)
MUTANTS = {
    "k1 with its sign turned": ("log_ratio = logprobs - ref_logprobs", "log_ratio = ref_logprobs - logprobs", "kl_estimates", None),
    "k3 the wrong way round": ("torch.expm1(-log_ratio) + log_ratio", "torch.expm1(log_ratio) - log_ratio", "kl_estimates", None),
    "KL of the reference from the policy": ("(logprobs.exp() * torch", "(ref_logprobs.exp() * torch", "kl_estimates", None),
    "mean over padding, too": ("mask.sum().clamp(min=1)", "mask.numel()", "masked_functions", None),
    "whitening over padding": ("masked_mean((x - mean) ** 2, mask)", "((x - mean) ** 2).mean()", "masked_functions", None),
    "whitened rewards lose their mean": ("scaled if shift_mean else scaled + mean", "scaled", "masked_functions", None),
    "advantages of padding": ("delta + gamma * lam * advantage, 0.0", "delta + gamma * lam * advantage, 1.0", "gae_ignores", None),
    "values of padding count": ("torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)", "rewards, values", "gae_ignores", None),
    "lambda left out": ("delta + gamma * lam * advantage", "delta + gamma * advantage", "gae_by_hand", None),
    "returns without values": ("return advantages, advantages + values", "return advantages, advantages", "gae_by_hand", None),
    "clip on the wrong side": ("torch.maximum(-advantages * ratio", "torch.minimum(-advantages * ratio", "ratio_clip", None),
    "value clip on the wrong side": ("torch.maximum((values", "torch.minimum((values", "value_clip", None),
    "the coefficient moves the wrong way": ("self.value *= 1 + error", "self.value *= 1 - error", "adaptive_coefficient", None),
    "the coefficient's error unclipped": ("min(max(kl / self.target - 1, -0.2), 0.2)", "kl / self.target - 1", "adaptive_coefficient", None),
    "mask shifted by one": ("< lengths[:, None]", "< lengths[:, None] - 1", "logprobs_are_those", "llama"),
    "T5's first token dropped": ("torch.cat([start, targets[:, :-1]], 1)", "targets", "logprobs_are_those", "t5"),
    "scored at another temperature": ("targets[mask], self.config.temperature)", "targets[mask])", "logprobs_are_those", "llama"),
    "scored at another temperature where the head learns": ("(logits.float() / self.config.temperature)", "logits.float()", "logprobs_are_those", "llama"),
    "positions count padding": ("prompt_mask.sum(1, keepdim=True) + torch", "prompt_mask.shape[1] + torch", "a_row_alone", "gpt2"),
    "padding is seen": ("torch.cat([prompt_mask, answer_mask], 1)", "torch.ones_like(torch.cat([prompt_mask, answer_mask], 1))", "a_row_alone", "llama"),
    "another prompt's cache": ("select_rows(read.cache, read.index)", "select_rows(read.cache, read.index.flip(0))", "a_row_alone", "llama"),
    "the score after EOS": ("rewards[torch.arange(len(last)), last]", "rewards[:, -1]", "score_stands", "llama"),
    "dropout on": ("= model.eval(), reward", "= model.train(), reward", "first_rollout", "llama"),
    "beta in the wrong unit": ("-self.kl_controller.value * kl\n", "-self.kl_controller.value * kl / mask.sum(1, keepdim=True)\n", "metrics_have", "llama"),
    "KL a token, not a sequence": ("sequence_kl = kl.sum(1)", "sequence_kl = kl.mean(1)", "metrics_have", "llama"),
    "a bonus for KL": ("kl_penalty = -self", "kl_penalty = self", "metrics_have", "llama"),
    "each micro-batch by its own tokens": ("minibatch_tokens).backward()", "mask.sum()).backward()", "gradient_does_not", "llama"),
    "the reference moves along": ("reference = copy.deepcopy(model)", "reference = model", "reference_is_apart", "llama"),
    "the reference is the policy": ("with self.model.disable_adapter():", "with contextmanager(lambda: iter([0]))():", "reference_never_changes", "llama"),
    "values from a head that does not start at zero": ("nn.init.zeros_(self.value_head.weight)", "nn.init.ones_(self.value_head.weight)", "values_are_zero", "llama"),
    "one step an epoch fewer": ("range(config.epochs)", "range(config.epochs - 1)", "optimizer_steps_are", "llama"),
    "sampled greedily": ("draws=draws[rows].to(base.device)", "draws=None", "samples_come_from", "llama"),
    "sampled at another temperature": ("dict(temperature=config.temperature", "dict(temperature=1.0", "samples_come_from", "llama"),
    "the frozen adapter is not the reference": ("self.reference_adapter is None:\n                with", "True:\n                with", "a_frozen_adapter", "llama"),
    "PEFT's gradients stay as it leaves them": ("parameter.requires_grad_(flag)", "pass", "a_frozen_adapter_is", "llama"),
    "the same draws in every step": ("* 1_000_003 + self.step", "* 1_000_003", "each_step_draws", "llama"),
    "the seed is ignored": ("torch.manual_seed(self.config.seed *", "torch.manual_seed(0 *", "same_seed", "llama"),
    "a penalty for those that ended": ("[completion.truncated for", "[not completion.truncated for", "cut_off", "llama"),
    "no early stop": ("approxkl > config.target_kl", "False", "past_target_kl", "llama"),
    "graphs kept past a step of the optimizer": ("share(rollout.micro_batches[0])", "share([*chain(*rollout.micro_batches)])", "kept_graphs", "llama"),
    "scores are never scaled": ("if config.scale_scores else", "if False else", "scores_are_scaled", "llama"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_line_is_noticed(mutant, tiny_folders, monkeypatch):
    search, replacement, test, kind = MUTANTS[mutant]
    broken = broken_copy(ppo, search, replacement)
    (noticing,) = [name for name in vars(test_ppo) if name.startswith("test_") and test in name]
    for name in NAMES:
        monkeypatch.setattr(test_ppo, name, getattr(broken, name))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_with_every_parameter(getattr(test_ppo, noticing), tiny_folders, kind, monkeypatch)


def run_with_every_parameter(test, tiny_folders, kind, monkeypatch):
    """Call `test` as pytest would: for all its parameters, with fresh models of the family `kind`."""
    choices = []
    for mark in getattr(test, "pytestmark", []):
        names, values = mark.args
        names = [names] if isinstance(names, str) else list(names)
        choices.append([dict(zip(names, value if len(names) > 1 else [value], strict=True)) for value in values])
    wanted = test.__code__.co_varnames[: test.__code__.co_argcount]
    for chosen in product(*choices):
        arguments = {name: value for part in chosen for name, value in part.items()}
        if "tiny" in wanted or "llama" in wanted:
            model = test_ppo.load(tiny_folders[kind])
            arguments["tiny" if "tiny" in wanted else "llama"] = model
        if "monkeypatch" in wanted:
            arguments["monkeypatch"] = monkeypatch
        test(**arguments)
