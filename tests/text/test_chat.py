"""A trace as ids, whatever is in its text."""

from lib.text import chat
from lib.text.chat import Trace

TRACE = Trace("How many socks?", "First, I count.\nWait, that is 12.", "The answer is 12.")


def test_space_around_the_parts_does_not_change_the_ids_and_space_within_them_stays(tokenizer):
    bare, spaced = (
        Trace("How many?", "First,\n\n  so.", "It is 12."),
        Trace("\n How many?  ", "\nFirst,\n\n  so.\n", " It is 12.\n\n"),
    )
    ids, learnt = chat.encode_trace(bare, tokenizer)
    assert chat.encode_trace(spaced, tokenizer) == (ids, learnt)
    assert "<think>\nFirst,\n\n  so.\n</think>\n\nIt is 12.<|im_end|>\n" in tokenizer.decode(ids)


def test_what_is_asked_is_the_same_ids_alone_and_within_a_trace(tokenizer):
    """What a model is asked in use is what it was trained behind; in one text, a merge could bridge prompt
    and thought.
    """
    ids, learnt = chat.encode_trace(Trace("How many?", "First.", "12"), tokenizer)
    alone = tokenizer(chat.prompt("How many?"), add_special_tokens=False)["input_ids"]
    assert ids[: len(alone)] == alone and learnt.index(True) == len(alone)


def test_a_trace_is_written_out_whole_and_only_the_models_part_is_learnt(tokenizer):
    ids, learnt = chat.encode_trace(TRACE, tokenizer)
    text = (
        "<|im_start|>user\nHow many socks?<|im_end|>\n<|im_start|>assistant\n<think>\nFirst, I count.\nWait,"
        " that is 12.\n</think>\n\nThe answer is 12.<|im_end|>\n"
    )
    # markers are single tokens
    assert tokenizer.decode(ids) == text == "".join(chat.parts(TRACE)) and ids.count(1) == 2
    assert tokenizer.decode([i for i, kept in zip(ids, learnt) if kept]) == text[text.index("<think>") :]
    assert learnt == sorted(learnt)


def test_the_tags_of_a_thought_are_found_as_ids(tokenizer):
    opening, closing = chat.think_tags(tokenizer)
    ids = chat.encode_trace(TRACE, tokenizer)[0]
    places = {
        name: [i for i in range(len(ids)) if ids[i : i + len(tag)] == tag]
        for name, tag in (("open", opening), ("close", closing))
    }
    assert len(places["open"]) == len(places["close"]) == 1
    assert tokenizer.decode(ids[places["open"][0] :]).startswith("<think>") and tokenizer.decode(
        ids[places["close"][0] :]
    ).startswith("</think>")
