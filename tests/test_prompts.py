"""Prompts with shots, with and without a chat template, and the label mask of a training example."""

import pytest
from conftest import make_tokenizer

from utils.generation import generate
from utils.lab import LabError
from utils.prompts import TEMPLATES, encode, encode_example, render, summary_prompt

DIALOGUE, SUMMARY = "a dog ran to the river", "the dog ran"
SHOTS = [("the cat sat", "a cat sat"), ("person1 asks person2", "person1 asks")]
EOS = 2


@pytest.fixture(params=[True, False], ids=["chat", "plain"])
def tokenizer(request):
    return make_tokenizer(pad_is_eos=True, chat=request.param)


def with_own_special_tokens(tokenizer):
    """`tokenizer` writing `<s>` before and `</s>` after a text, as Llama's and T5's do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", EOS)]
    )
    return tokenizer


# --- messages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
def test_without_shots_the_prompt_is_one_question_that_holds_the_dialogue(template):
    (message,) = summary_prompt(DIALOGUE, template=template)
    assert message == {"role": "user", "content": TEMPLATES[template].replace("{dialogue}", DIALOGUE)}


@pytest.mark.parametrize("template", TEMPLATES)
def test_shots_are_questions_and_answers_before_the_question(template):
    messages = summary_prompt(DIALOGUE, SHOTS, template)
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert [message["content"] for message in messages[1::2]] == [summary for _, summary in SHOTS]
    for message, dialogue in zip(messages[::2], ["the cat sat", "person1 asks person2", DIALOGUE], strict=True):
        assert message["content"] == TEMPLATES[template].replace("{dialogue}", dialogue)


def test_braces_in_a_dialogue_stand_as_they_are():
    assert summary_prompt("{dialogue} {0} {", [("{x}", "{y}")], "bare") == [
        {"role": "user", "content": "{x}"},
        {"role": "assistant", "content": "{y}"},
        {"role": "user", "content": "{dialogue} {0} {"},
    ]


def test_an_unknown_template_is_refused_with_the_known_ones():
    with pytest.raises(LabError, match=r"'haiku'.*bare, instruction, question, completion"):
        summary_prompt(DIALOGUE, template="haiku")


# --- text and tokens ---------------------------------------------------------------------------------------------


def test_a_chat_template_is_applied_and_asks_for_the_answer():
    tokenizer = make_tokenizer(pad_is_eos=True, chat=True)
    messages = summary_prompt(DIALOGUE, SHOTS[:1], "bare")
    assert render(tokenizer, messages) == (
        "<s> the cat sat </s> <s> a cat sat </s> <s> a dog ran to the river </s> <s> summary : "
    )


def test_without_a_chat_template_the_messages_stand_below_each_other():
    tokenizer = make_tokenizer(pad_is_eos=True, chat=False)
    assert render(tokenizer, summary_prompt(DIALOGUE, SHOTS[:1], "bare")) == (
        "the cat sat\n\na cat sat\n\na dog ran to the river"
    )


def test_a_string_stands_as_it_is(tokenizer):
    assert render(tokenizer, DIALOGUE) == DIALOGUE
    assert tokenizer.decode(encode(tokenizer, DIALOGUE)) == DIALOGUE


def test_encoded_messages_are_the_rendered_text(tokenizer):
    messages = summary_prompt(DIALOGUE, SHOTS, "bare")
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, messages)) == render(tokenizer, messages).split()


def test_special_tokens_are_written_once():
    """By the chat template where it is applied, by the tokenizer elsewhere."""
    chat = with_own_special_tokens(make_tokenizer(pad_is_eos=True, chat=True))
    plain = with_own_special_tokens(make_tokenizer(pad_is_eos=True, chat=False))
    messages = summary_prompt("a dog", template="bare")
    assert chat.convert_ids_to_tokens(encode(chat, messages)) == ["<s>", "a", "dog", "</s>", "<s>", "summary", ":"]
    assert chat.convert_ids_to_tokens(encode(chat, "a dog")) == ["<s>", "a", "dog", "</s>"]
    assert plain.convert_ids_to_tokens(encode(plain, messages)) == ["<s>", "a", "dog", "</s>"]


# --- training examples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [DIALOGUE, summary_prompt(DIALOGUE, SHOTS, "bare")], ids=["text", "messages"])
def test_the_labels_hide_exactly_the_prompt_and_eos_is_learned(tokenizer, prompt):
    example = encode_example(tokenizer, prompt, SUMMARY)
    target = [*tokenizer(SUMMARY).input_ids, EOS]
    length = len(encode(tokenizer, prompt))
    assert example["input_ids"][length:] == example["labels"][length:] == target
    assert example["labels"][:length] == [-100] * length
    assert len(example["input_ids"]) == len(example["labels"])


@pytest.mark.parametrize("prompt", [DIALOGUE, summary_prompt(DIALOGUE, SHOTS, "bare")], ids=["text", "messages"])
def test_the_prompt_of_an_example_is_the_prompt_at_generation_time(tiny, prompt, monkeypatch):
    """Token for token what the model is given by `generate`, for both kinds of model."""
    model, tokenizer = tiny
    reader = model.get_encoder() if model.config.is_encoder_decoder else model
    original, given = reader.forward, []

    def spy(*arguments, **named):
        given.extend((arguments[0] if arguments else named["input_ids"]).tolist())
        return original(*arguments, **named)

    monkeypatch.setattr(reader, "forward", spy)
    generate(model, tokenizer, [prompt], max_new_tokens=1)
    example = encode_example(tokenizer, prompt, SUMMARY, encoder_decoder=model.config.is_encoder_decoder)
    target = tokenizer(SUMMARY).input_ids
    length = len(example["input_ids"]) - (0 if model.config.is_encoder_decoder else len(target) + 1)
    assert given == [example["input_ids"][:length]] == [encode(tokenizer, prompt)]


def test_a_completion_has_no_special_tokens_but_one_eos():
    tokenizer = with_own_special_tokens(make_tokenizer(pad_is_eos=True, chat=False))
    target = [*tokenizer(SUMMARY, add_special_tokens=False).input_ids, EOS]
    assert encode_example(tokenizer, "a dog", SUMMARY)["labels"] == [-100] * 4 + target
    assert encode_example(tokenizer, "a dog", SUMMARY, encoder_decoder=True)["labels"] == target


def test_a_long_prompt_loses_its_beginning_and_the_completion_stays_whole(tokenizer):
    prompt = summary_prompt(DIALOGUE, SHOTS, "bare")
    inputs, target = encode(tokenizer, prompt), [*tokenizer(SUMMARY).input_ids, EOS]
    whole = len(inputs) + len(target)
    for max_length in range(len(target) + 1, whole + 2):
        kept = min(max_length - len(target), len(inputs))
        example = encode_example(tokenizer, prompt, SUMMARY, max_length=max_length)
        assert example["input_ids"] == inputs[len(inputs) - kept :] + target
        assert example["labels"] == [-100] * kept + target


def test_for_an_encoder_decoder_the_prompt_is_the_input_and_the_completion_the_labels(tokenizer):
    inputs, target = encode(tokenizer, DIALOGUE), [*tokenizer(SUMMARY).input_ids, EOS]
    assert encode_example(tokenizer, DIALOGUE, SUMMARY, encoder_decoder=True) == {"input_ids": inputs, "labels": target}
    long = encode_example(tokenizer, DIALOGUE, "a b", encoder_decoder=True, max_length=4)
    assert long == {"input_ids": inputs[-4:], "labels": [*tokenizer("a b").input_ids, EOS]}


@pytest.mark.parametrize("encoder_decoder", [True, False])
def test_a_completion_that_does_not_fit_is_refused(tokenizer, encoder_decoder):
    with pytest.raises(LabError, match="completion of 4 tokens does not fit in max_length=3"):
        encode_example(tokenizer, DIALOGUE, SUMMARY, encoder_decoder=encoder_decoder, max_length=3)


def test_a_completion_that_leaves_no_room_for_a_prompt_is_refused(tokenizer):
    with pytest.raises(LabError, match="completion of 4 tokens does not fit in max_length=4"):
        encode_example(tokenizer, DIALOGUE, SUMMARY, max_length=4)
