"""DPO and RLOO through TRL: what is learned, from what, and what is left as it was."""

import copy

import pytest
import torch

import utils.preference_optimization as preference_optimization
from utils.generation import Completion, generate
from utils.lab import LabError, set_seed
from utils.models import load_model
from utils.preference_optimization import train_dpo, train_rloo
from utils.prompts import IGNORED, encode
from utils.training import label_loss, lora_config

QUESTIONS = [[{"role": "user", "content": text}] for text in ("the cat sat", "a dog ran", "the red house", "big river")]

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")


@pytest.fixture
def llama(tiny_folders):
    return load_model(tiny_folders["llama"], dtype=torch.float32, device="cpu")


def answer(tokenizer, text, *, ended=True):
    ids = [*tokenizer(text).input_ids, *([tokenizer.eos_token_id] if ended else [])]
    return Completion(text, ids, truncated=not ended)


@torch.no_grad()
def margin(model, tokenizer, pairs):
    """How much likelier a token of the chosen completions is than one of the rejected, in nats, the mean over pairs."""
    losses = []
    for prompt, *completions in pairs:
        asked = encode(tokenizer, prompt)
        for completion in completions:
            labels = [IGNORED] * len(asked) + completion.token_ids
            example = {"input_ids": asked + completion.token_ids, "labels": labels}
            losses.append(float(label_loss(model, tokenizer, [example])))
    return sum(losses[1::2]) / len(pairs) - sum(losses[::2]) / len(pairs)


def word_share(prompts, completions):
    """Share of words of more than one letter: about half of what the tiny model writes at random."""
    words = [text.split() for text in completions]
    return [sum(len(word) > 1 for word in each) / max(1, len(each)) for each in words]


def rloo(model, tokenizer, reward=word_share, prompts=QUESTIONS, **settings):
    settings = {
        "num_completions": 4, "batch_size": 16, "minibatch_size": 8, "micro_batch_size": 4, "max_new_tokens": 6, "beta": 0.0,
        "learning_rate": 2e-2,
    } | settings  # fmt: skip
    return train_rloo(model, tokenizer, prompts, reward, adapter=lora_config(model), **settings)


# --- DPO ---------------------------------------------------------------------------------------------------------


def test_dpo_prefers_what_was_chosen(llama):
    model, tokenizer = llama
    pairs = [(q, answer(tokenizer, "the blue river"), answer(tokenizer, "a small cat ran")) for q in QUESTIONS]
    before = margin(model, tokenizer, pairs)
    tuned = train_dpo(
        model,
        tokenizer,
        pairs,
        adapter=lora_config(model),
        learning_rate=5e-3,
        epochs=4,
        batch_size=2,
        micro_batch_size=1,
    )
    assert margin(tuned, tokenizer, pairs) > before + 0.3
    with tuned.disable_adapter():
        assert margin(tuned, tokenizer, pairs) == pytest.approx(before, abs=1e-4), "the model under the adapter changed"


def test_dpo_reads_the_tokens_as_they_were_sampled(llama, monkeypatch):
    model, tokenizer = llama
    rows = []

    class Noting(preference_optimization._TokenizedDPO):
        def __init__(self, **settings):
            super().__init__(**settings)
            rows.extend(self.train_dataset)

    monkeypatch.setattr(preference_optimization, "_TokenizedDPO", Noting)
    cut_off, ended = answer(tokenizer, "the red", ended=False), answer(tokenizer, "a dog")
    train_dpo(model, tokenizer, [(QUESTIONS[0], cut_off, ended)], adapter=lora_config(model), batch_size=1)
    (row,) = rows
    assert row["chosen_ids"] == cut_off.token_ids, "a text that was cut off has no end to learn"
    assert row["rejected_ids"] == ended.token_ids
    assert row["prompt_ids"] == encode(tokenizer, QUESTIONS[0])


# --- RLOO --------------------------------------------------------------------------------------------------------


def test_rloo_goes_where_the_reward_is(llama):
    model, tokenizer = llama
    sampling = dict(completions_per_prompt=32, do_sample=True, max_new_tokens=6, show_progress=False)

    def mean_reward(network):
        set_seed(5)
        texts = [c.text for c in generate(network, tokenizer, QUESTIONS, **sampling)]
        return sum(word_share(None, texts)) / len(texts)

    def penalty(prompts, completions):
        return [-share for share in word_share(prompts, completions)]

    praised, blamed = (
        rloo(copy.deepcopy(model), tokenizer, reward, prompts=8 * QUESTIONS, learning_rate=5e-2)
        for reward in (word_share, penalty)
    )
    assert mean_reward(blamed) + 0.03 < mean_reward(praised)


def test_rloo_samples_each_prompt_once_and_shows_the_reward_what_was_asked(llama):
    model, tokenizer = llama
    asked = []

    def reward(prompts, completions):
        assert len(prompts) == len(completions)
        asked.extend(prompts)
        return word_share(prompts, completions)

    rloo(model, tokenizer, reward, epochs=3)
    wanted = [question[-1]["content"] for question in QUESTIONS for _ in range(4)]
    assert asked == wanted


def test_same_seed_same_adapter(llama):
    model, tokenizer = llama
    tuned = [rloo(copy.deepcopy(model), tokenizer, seed=seed) for seed in (1, 1, 2)]
    weights = [torch.cat([p.flatten() for p in t.parameters() if p.requires_grad]) for t in tuned]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# --- both --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_refused(llama, tiny_folders):
    model, tokenizer = llama
    with pytest.raises(LabError, match="pairs"):
        train_dpo(model, tokenizer, [], adapter=lora_config(model))
    with pytest.raises(LabError, match=r"4 prompts with num_completions=4.*16 samples.*batch_size=12"):
        rloo(model, tokenizer, batch_size=12, minibatch_size=12)
    with pytest.raises(LabError, match="num_completions=1"):
        rloo(model, tokenizer, num_completions=1)
    with pytest.raises(LabError, match=r"batch_size=8.*micro_batch_size=3"):
        rloo(model, tokenizer, micro_batch_size=3)
    t5, t5_tokenizer = load_model(tiny_folders["t5"], dtype=torch.float32, device="cpu")
    with pytest.raises(LabError, match="RLOO trainer takes decoder-only models"):
        rloo(t5, t5_tokenizer)
    pair = (QUESTIONS[0], answer(t5_tokenizer, "red"), answer(t5_tokenizer, "blue"))
    with pytest.raises(LabError, match="DPO trainer takes decoder-only models"):
        train_dpo(t5, t5_tokenizer, [pair], adapter=lora_config(t5))


def test_the_tokenizer_pads_where_it_did(llama):
    model, tokenizer = llama
    tokenizer.padding_side = "right"
    rloo(model, tokenizer)
    assert tokenizer.padding_side == "right"


def test_a_copy_of_the_tuned_model_computes_with_its_own_weights(llama):
    model, tokenizer = llama
    other = copy.deepcopy(rloo(model, tokenizer))
    with torch.no_grad():
        other.get_output_embeddings().weight.zero_()
    assert not other(torch.tensor([[5, 6, 7]])).logits.any()


def test_nothing_is_drawn_when_headless(llama, capfd):
    model, tokenizer = llama
    rloo(model, tokenizer)
    assert capfd.readouterr().out == ""
