"""The preference model and the civility judge: the loss by hand, padding, and toys that both must learn."""

import math

import pytest
import torch
from conftest import save_classifier

from utils.data import DataError
from utils.lab import LabError
from utils.models import load_model
from utils.rewards import (
    CivilityJudge,
    ClassifierReward,
    PreferenceModel,
    embed,
    fit_classifier,
    train_preference_model,
)

# The good texts hold "blue", the bad ones "red"; nothing else tells them apart.
FRAMES = [
    "the cat sat on the {} mat",
    "a {} dog ran",
    "{} house and river",
    "person1 wants a big {} house",
    "the small cat ran to the {} river",
    "person2 asks : {} ?",
]
HELD_OUT = ["a big {} cat sat", "the {} river ran to the house", "person1 tells person2 the dog ran to the {} mat"]
TEXTS = ["the cat", "a dog ran to the red house and the river .", "big", "person1 asks person2"]


pytestmark = pytest.mark.usefixtures("quick_garbage_collection")


def fill(word, frames=FRAMES):
    return [frame.format(word) for frame in frames]


@pytest.fixture
def encoder(tiny_folders):
    return load_model(tiny_folders["bert"], dtype=torch.float32, device="cpu")


@pytest.fixture
def make_preference_model(tiny_folders):
    def make(**options):
        torch.manual_seed(0)
        model, tokenizer = load_model(tiny_folders["bert"], dtype=torch.float32, device="cpu", num_labels=1)
        return PreferenceModel(model, tokenizer, **options)

    return make


def train(preference_model, prompts=FRAMES, chosen=None, rejected=None, **settings):
    chosen, rejected = chosen or fill("blue"), rejected or fill("red")
    return train_preference_model(preference_model, prompts, chosen, rejected, **settings)


# --- the preference model ----------------------------------------------------------------------------------------


def test_a_model_with_other_than_one_output_is_refused_and_its_labels_are_named(tiny_folders):
    model, tokenizer = load_model(tiny_folders["bert"], device="cpu", num_labels=2)
    model.config.id2label = {0: "nothate", 1: "hate"}
    with pytest.raises(LabError, match=r"2 \(nothate, hate\).*num_labels=1.*label"):
        PreferenceModel(model, tokenizer)


@pytest.mark.parametrize("reads_prompt", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_a_text_alone_and_in_a_batch_has_the_same_score(make_preference_model, reads_prompt, batch_size):
    preference_model = make_preference_model(reads_prompt=reads_prompt, batch_size=batch_size)
    prompts = ["the cat sat", "a", "the dog ran to the river", "big"]
    together = preference_model(prompts, TEXTS)
    alone = [preference_model([prompt], [text])[0] for prompt, text in zip(prompts, TEXTS, strict=True)]
    assert together == pytest.approx(alone, abs=1e-6)
    assert max(together) - min(together) > 1e-3


def test_a_score_is_the_models_logit_shifted_and_scaled(make_preference_model):
    preference_model = make_preference_model()
    with torch.no_grad():
        ids = preference_model.tokenizer(TEXTS[1], return_tensors="pt").input_ids
        logit = float(preference_model.model(ids).logits)
    assert preference_model(["the"], [TEXTS[1]]) == [pytest.approx(logit, abs=1e-6)]
    preference_model.mean, preference_model.std = 2.0, 0.5
    assert preference_model(["the"], [TEXTS[1]]) == [pytest.approx((logit - 2) / 0.5, abs=1e-5)]


@pytest.mark.parametrize("reads_prompt", [True, False])
def test_the_prompt_counts_only_where_it_is_read(make_preference_model, reads_prompt):
    one, other = make_preference_model(reads_prompt=reads_prompt)(["the cat", "a river ran"], ["dog", "dog"])
    assert (one != other) == reads_prompt


def test_unequal_prompts_and_completions_are_refused(make_preference_model):
    with pytest.raises(ValueError, match="shorter"):
        make_preference_model()(["the", "a"], ["dog"])


@pytest.mark.parametrize("reads_prompt", [True, False])
@pytest.mark.parametrize("longer", ["the prompt", "the completion", "both"])
def test_texts_longer_than_the_encoder_reads_are_cut(make_preference_model, reads_prompt, longer):
    preference_model = make_preference_model(reads_prompt=reads_prompt)
    prompt = "the cat " * (1 if longer == "the completion" else 400)
    completion = "dog ran " * (1 if longer == "the prompt" else 400)
    (score,) = preference_model([prompt], [completion])
    assert math.isfinite(score)


def test_a_cut_pair_keeps_the_completion(make_preference_model):
    preference_model = make_preference_model(reads_prompt=True)
    ids = preference_model.encode("the " * 600, "dog ran")
    assert len(ids) == 512
    assert preference_model.tokenizer.decode(ids[-3:]) == "the dog ran"


def test_the_first_loss_is_the_bradley_terry_loss_of_the_scores(make_preference_model, monkeypatch):
    monkeypatch.setattr("utils.rewards.choose_dtype", lambda device: torch.float32)
    preference_model = make_preference_model()
    chosen, rejected = (torch.tensor(preference_model(FRAMES, fill(word))) for word in ("blue", "red"))
    losses = train(preference_model, epochs=1)
    assert losses == [pytest.approx(-float(torch.nn.functional.logsigmoid(chosen - rejected).mean()), rel=1e-5)]


@pytest.mark.parametrize("reads_prompt", [True, False])
def test_training_ranks_held_out_pairs_and_scales_the_scores(make_preference_model, reads_prompt):
    preference_model = make_preference_model(reads_prompt=reads_prompt)
    losses = train(preference_model, epochs=40, learning_rate=3e-3)
    assert len(losses) == 40
    assert losses[-1] < 0.1 < losses[0]
    better, worse = (preference_model(HELD_OUT, fill(word, HELD_OUT)) for word in ("blue", "red"))
    assert all(b > w + 1 for b, w in zip(better, worse, strict=True))
    scores = torch.tensor(preference_model(FRAMES * 2, fill("blue") + fill("red")))
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std()) == pytest.approx(1, abs=1e-4)
    assert not any(module.training for module in preference_model.model.modules())


def test_the_scale_does_not_come_from_an_earlier_training(make_preference_model):
    preference_model = make_preference_model()
    preference_model.mean, preference_model.std = 100.0, 0.01
    train(preference_model, epochs=1)
    scores = torch.tensor(preference_model(FRAMES * 2, fill("blue") + fill("red")))
    assert float(scores.mean()) == pytest.approx(0, abs=1e-3)
    assert float(scores.std()) == pytest.approx(1, abs=1e-3)


def test_same_seed_same_training_and_another_seed_another(make_preference_model):
    runs = []
    for seed in (3, 3, 4):
        preference_model = make_preference_model()
        losses = train(preference_model, epochs=1, batch_size=2, seed=seed)
        runs.append((losses, preference_model(FRAMES, fill("blue"))))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_unequal_or_no_pairs_are_refused(make_preference_model):
    with pytest.raises(DataError, match="2 prompts, 1 chosen, 2 rejected"):
        train(make_preference_model(), ["the", "a"], ["dog"], ["cat", "mat"])
    with pytest.raises(DataError, match="1 rejected"):
        train(make_preference_model(), ["the", "a"], ["dog", "big"], ["cat"])
    with pytest.raises(DataError, match="no pairs"):
        train_preference_model(make_preference_model(), [], [], [])


# --- a label of a classifier as reward ---------------------------------------------------------------------------


@pytest.fixture(params=[("hate", "nothate"), ("nothate", "hate"), ("odd", "hate", "nothate")])
def classifier_folder(request, tiny_folders, tmp_path):
    """A tiny classifier saved with its labels' names, in different orders."""
    return save_classifier(tiny_folders["bert"], tmp_path, request.param), request.param


def test_a_label_is_found_by_its_name_wherever_it_stands(classifier_folder):
    folder, names = classifier_folder
    reward = ClassifierReward.load(folder, "nothate", batch_size=3)
    with torch.no_grad():
        ids = reward.tokenizer(TEXTS[1], return_tensors="pt").input_ids
        logits = dict(zip(names, reward.model(ids).logits[0].tolist(), strict=True))
    (score,) = reward([""], [TEXTS[1]])
    assert len({f"{logit:.3f}" for logit in logits.values()}) == len(names)
    assert score == pytest.approx(logits["nothate"], abs=0.02)  # bf16, where the processor has it


def test_a_label_that_is_not_there_is_refused_with_those_that_are(classifier_folder):
    folder, names = classifier_folder
    with pytest.raises(LabError, match=f"label='civil' is none.*{', '.join(names)}"):
        ClassifierReward.load(folder, "civil")


def test_a_classifier_reads_the_prompt_only_if_asked_to(classifier_folder):
    folder, _ = classifier_folder
    for reads in (True, False):
        one, other = ClassifierReward.load(folder, "hate", reads_prompt=reads)(["the cat", "a river ran"], ["dog"] * 2)
        assert (one != other) == reads


def test_an_empty_text_has_a_score_and_a_direction_alone_and_among_others(classifier_folder, encoder):
    """A policy may write nothing, and not every tokenizer adds marks of its own."""
    reward = ClassifierReward.load(classifier_folder[0], "hate")
    (alone,), among = reward([""], [""]), reward(["", ""], ["", "the cat ran"])
    assert alone == pytest.approx(among[0], abs=0.02)
    assert embed(*encoder, [""]).norm() == pytest.approx(1.0)


def test_a_fitted_classifier_knows_its_labels_and_leaves_the_encoder_alone(tiny_folders):
    torch.manual_seed(0)
    model, tokenizer = load_model(tiny_folders["bert"], dtype=torch.float32, device="cpu", num_labels=2)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    fit_classifier(
        model, tokenizer, fill("red") + fill("blue"), ["hostile"] * len(FRAMES) + ["civil"] * len(FRAMES), l2=1e-6
    )
    assert model.config.id2label == {0: "hostile", 1: "civil"}
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    for label, word in (("civil", "blue"), ("hostile", "red")):
        reward = ClassifierReward(model, tokenizer, label=label)
        assert all(score > 0 for score in reward([""] * len(FRAMES), fill(word)))
        other = "red" if word == "blue" else "blue"
        assert all(score < 0 for score in reward([""] * len(FRAMES), fill(other)))


def test_a_classifier_with_another_number_of_outputs_than_labels_is_refused(tiny_folders):
    model, tokenizer = load_model(tiny_folders["bert"], device="cpu", num_labels=3)
    with pytest.raises(DataError, match=r"2 labels \(b, a\) for 3 outputs.*num_labels=2"):
        fit_classifier(model, tokenizer, ["the", "cat"], ["b", "a"])


# --- embeddings and the judge ------------------------------------------------------------------------------------


def test_embeddings_have_length_one(encoder):
    embeddings = embed(*encoder, TEXTS)
    assert embeddings.shape == (4, 32)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))


@torch.no_grad()
def test_an_embedding_is_the_mean_over_the_tokens(encoder):
    model, tokenizer = encoder
    hidden = model(tokenizer(TEXTS[1], return_tensors="pt").input_ids).last_hidden_state[0].mean(0)
    torch.testing.assert_close(embed(model, tokenizer, TEXTS)[1], hidden / hidden.norm(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_padding_does_not_change_an_embedding(encoder, batch_size):
    alone = torch.cat([embed(*encoder, [text]) for text in TEXTS])
    torch.testing.assert_close(embed(*encoder, TEXTS, batch_size=batch_size), alone, atol=1e-6, rtol=1e-5)


def fit_judge(encoder, **settings):
    texts, labels = fill("blue") + fill("red"), ["civil"] * len(FRAMES) + ["hostile"] * len(FRAMES)
    return CivilityJudge(*encoder).fit(texts, labels, **settings)


def test_the_judge_tells_hostile_from_civil(encoder):
    judge = fit_judge(encoder, l2=1e-5)
    civil, hostile = judge(fill("blue", HELD_OUT)), judge(fill("red", HELD_OUT))
    assert civil.shape == (len(HELD_OUT),)
    assert (hostile > civil + 0.2).all()
    assert (judge(fill("blue")) < 0.5).all()
    assert (judge(fill("red")) > 0.5).all()


def test_the_judge_is_the_same_every_time(encoder):
    judges = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        judges.append(fit_judge(encoder))
    assert torch.equal(judges[0].weight, judges[1].weight)
    assert torch.equal(judges[0](HELD_OUT), judges[1](HELD_OUT))


def test_the_judge_is_at_the_minimum_of_its_loss(encoder):
    judge = fit_judge(encoder, l2=1e-2)
    x = embed(*encoder, fill("blue") + fill("red"))
    y = torch.tensor([0.0] * len(FRAMES) + [1.0] * len(FRAMES))
    with torch.no_grad():
        error = torch.sigmoid(x @ judge.weight + judge.bias) - y
        gradient = x.T @ error / len(y) + 2 * 1e-2 * judge.weight
    assert float(gradient.abs().max()) < 1e-4
    assert abs(float(error.mean())) < 1e-4


def test_the_encoder_stays_as_it_is(encoder):
    before = [parameter.detach().clone() for parameter in encoder[0].parameters()]
    fit_judge(encoder)
    assert all(map(torch.equal, before, encoder[0].parameters()))
    assert all(parameter.grad is None for parameter in encoder[0].parameters())


def test_a_judge_that_was_not_fitted_says_so(encoder):
    with pytest.raises(LabError, match="fit"):
        CivilityJudge(*encoder)(TEXTS)
