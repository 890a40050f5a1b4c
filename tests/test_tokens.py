import itertools
import json
import logging

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from architectures import save_language_model, word_tokenizer
from chat_tokenizers import FAMILIES, chat_tokenizer
from rlhf_reward import RewardConfig, RewardModel, RewardTrainer, load_rows, tokenize_rows
from rlhf_reward.comparison import CACHE_VERSION
from rlhf_reward.data import ranked_pairs, to_comparison, whole_texts
from rlhf_reward.empty_responses import has_empty_response
from rlhf_reward.evaluation import Rule, evaluate
from rlhf_reward.templates import Conversation
from rlhf_reward.tokens import encode, longer_wins, render, truncate_prompt, whole_sequences

PAIR = {"prompt": "w5 ", "chosen": "w6", "rejected": "w7"}
TOKENIZERS = {family: chat_tokenizer(family) for family in FAMILIES}


def tokenize(rows, tokenizer=None, max_length=10_000, **options):
    return tokenize_rows(
        Dataset.from_list(rows), tokenizer or word_tokenizer(), max_length, **options
    ).to_list()


def ids_alone(text, tokenizer):
    "Return the ids of a whole text: a conversation as rendered, a string by hand from its body and special tokens."
    if isinstance(text, Conversation):
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token
    eos = tokenizer.eos_token
    begins = bos is not None and not FAMILIES_ALONE[id(tokenizer)].startswith("$A")
    while bos and text.startswith(bos):
        text = text[len(bos) :]
    while text.rstrip().endswith(eos):
        text = text.rstrip()[: -len(eos)]
    body = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id] * begins + body + [tokenizer.eos_token_id]


FAMILIES_ALONE = {id(tokenizer): FAMILIES[family][3] for family, tokenizer in TOKENIZERS.items()}


def is_plain(text):
    "Return whether a file would not take the text for messages that are written as JSON."
    return not text.lstrip().startswith(('[{"', "[{'"))


common_text = st.text(st.sampled_from("ab the\n é–😀"), max_size=12)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(is_plain)
text = common_text | any_text


def alternating(contents):
    "Return messages of the user and the assistant in turn."
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


def of_assistant(contents):
    return [{"role": "assistant", "content": content} for content in contents]


contents = st.lists(text, min_size=1, max_size=3)
strings = st.lists(text, min_size=2, max_size=5)
prompts_and_responses = st.one_of(
    st.tuples(text, strings),
    st.tuples(contents.map(alternating), strings),
    st.tuples(
        contents.map(alternating),
        st.lists(contents.map(of_assistant), min_size=2, max_size=4),
    ),
)


@settings(max_examples=10, deadline=None)
@given(st.lists(prompts_and_responses, min_size=3, max_size=3), st.randoms(use_true_random=False))
@pytest.mark.parametrize("family", FAMILIES)
def test_stored_sequences_are_those_of_the_whole_texts_alone(family, several, random):
    tokenizer = TOKENIZERS[family]
    rows = []
    sequences = []
    for prompt, responses in several:
        scores = [random.randint(0, 3) for _ in responses]
        row = {"prompt": prompt, "responses": responses, "scores": scores}
        comparison = to_comparison(row)
        texts = [render(text, tokenizer) for text in whole_texts(comparison)]
        expected = [ids_alone(text, tokenizer) for text in texts]
        assert encode(texts, tokenizer) == expected
        if all(expected[winner] != expected[loser] for winner, loser in ranked_pairs(comparison.ranks)):
            rows.append(row)
            sequences.append(expected)
    by_form = {}  # a table has strings or messages
    for row, expected in zip(rows, sequences):
        form = type(row["prompt"]), type(row["responses"][0])
        by_form.setdefault(form, []).append((row, expected))
    for part in by_form.values():
        stored = tokenize([row for row, _ in part], tokenizer, keep_ties=True)
        for one, (row, expected) in zip(stored, part, strict=True):
            check_stored(one, row["prompt"], expected, tokenizer)


def check_stored(stored, prompt, expected, tokenizer):
    assert whole_sequences(stored) == expected
    shared = stored["shared_prefix"]
    rests = stored["rests"]
    assert [shared + rest for rest in rests] == expected
    assert stored["length"] == max(map(len, expected))
    # The prefix is the longest possible: what follows differs in its first token.
    assert not all(rests) or len({rest[0] for rest in rests}) > 1
    for ids in expected if isinstance(prompt, str) else ():
        assert ids.count(tokenizer.bos_token_id) == (tokenizer.bos_token is not None)
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_tokenizer_encodes_alike(family, tmp_path):
    tokenizer = TOKENIZERS[family]
    model = RewardModel(save_language_model("llama", tmp_path / "base"), device="cpu")
    model.backbone.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "saved", tokenizer)
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    row = {"prompt": "the ab", "chosen": "ba\n", "rejected": " the"}
    chat = {**row, "prompt": [{"role": "user", "content": "the ab"}]}
    assert tokenize([row], saved) == tokenize([row], tokenizer)
    assert tokenize([chat], saved) == tokenize([chat], tokenizer)


def test_what_is_decided_about_the_end_is_saved_and_used(tmp_path):
    model = RewardModel(save_language_model("llama", tmp_path / "base"), device="cpu")
    assert model.ends_with_eos  # what is trained here
    model.save_pretrained(tmp_path / "saved", word_tokenizer())
    assert RewardModel.from_pretrained(tmp_path / "saved", device="cpu").ends_with_eos
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["rlhf_reward"].pop("ends_with_eos") is True
    del config["rlhf_reward"]  # as if made elsewhere
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    foreign = RewardModel.from_pretrained(tmp_path / "saved", device="cpu")
    assert not foreign.ends_with_eos
    foreign.save_pretrained(tmp_path / "again", word_tokenizer())
    assert not RewardModel.from_pretrained(tmp_path / "again", device="cpu").ends_with_eos
    for trained, ids in ((model, [5, 6, 2]), (foreign, [5, 6])):
        trainer = RewardTrainer(
            trained,
            RewardConfig(str(tmp_path / "run"), use_cpu=True),
            train_dataset=Dataset.from_list([PAIR]),
            processing_class=word_tokenizer(),
        )
        assert whole_sequences(trainer.train_dataset[0])[0] == ids


def test_texts_of_models_made_elsewhere_stay_as_their_tokenizer_writes_them():
    for tokenizer in TOKENIZERS.values():
        for text in ("the ab", f"the ab{tokenizer.eos_token}\n"):
            assert encode([text], tokenizer, ends_with_eos=False) == tokenizer([text])["input_ids"]


def with_template(template):
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize(
    "text", ["w5 w6", "w5 w6 <eos>", "w5 w6 <eos> <eos> ", "<bos> w5 w6", "<bos> w5 w6 <eos>\n"]
)
@pytest.mark.parametrize(
    "template, begin", [("$A", 0), ("<bos> $A", 1), ("$A <eos>", 0), ("<bos> $A <eos>", 1)]
)
def test_begin_and_end_appear_once(template, begin, text):
    "Whatever the tokenizer adds and the text brings along."
    begin = max(begin, text.startswith("<bos>"))
    assert encode([text], with_template(template)) == [[1] * begin + [5, 6, 2]]


def test_ends_that_a_text_brings_along_are_one():
    for family, tokenizer in TOKENIZERS.items():
        end = tokenizer.eos_token
        alone, *others = encode(
            [text for text in ("ab", f"ab{end}", f"ab{end} {end}\n", f"ab {end}")], tokenizer
        )
        assert others[:2] == [alone] * 2
        assert alone.count(tokenizer.eos_token_id) == 1
        # the space before it is of the text
        assert others[2][:-1] != alone[:-1]
        assert others[2].count(tokenizer.eos_token_id) == 1


def test_end_is_sep_for_encoders_and_nothing_for_tokenizers_without_one():
    tokenizer = Tokenizer(
        models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    encoder = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]"
    )
    assert encode(["a a"], encoder) == [[1, 3, 3, 2]]
    assert truncate_prompt([[1, 3, 3, 3, 2], [1, 3, 3, 2]], [1, 3, 3, 2], 4, encoder) == [
        [1, 3, 3, 2],
        [1, 3, 2],
    ]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert encode(["a a"], PreTrainedTokenizerFast(tokenizer_object=tokenizer)) == [[3, 3]]


def test_no_seam_between_prompt_and_response():
    "Byte-level BPE would cut 'ab' + 'ab' otherwise in one piece than in two."
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1, "ba": 2}, [("b", "a")]))
    )
    (stored,) = tokenize([{"prompt": "ab", "chosen": "ab", "rejected": "b"}], tokenizer)
    assert stored["shared_prefix"] == [0]
    assert stored["rests"] == [[2, 1], [1, 1]]


def test_tools_and_template_arguments_reach_the_template():
    tokenizer = word_tokenizer(
        chat_template="{% for tool in tools %}{{ tool.name }} {% endfor %}{{ word }}"
        "{% for m in messages %} {{ m.content }}{{ m.tool_calls[0].name if m.tool_calls }}{% endfor %}"
    )
    row = {
        "prompt": [{"role": "user", "content": "w5"}],
        "chosen": [
            {"role": "assistant", "content": None, "tool_calls": [{"name": "w6", "id": None}]}
        ],
        "rejected": [{"role": "assistant", "content": "w7", "tool_calls": None}],
        "tools": [{"name": "w8"}],
        "chat_template_kwargs": {"word": "w9"},
    }
    as_json = {
        **row,
        "tools": json.dumps(row["tools"]),
        "chat_template_kwargs": json.dumps(row["chat_template_kwargs"]),
    }
    for form in (row, as_json):
        assert [whole_sequences(example) for example in tokenize([form], tokenizer)] == [
            [[8, 9, 5, 6], [8, 9, 5, 7]]
        ]


REFUSES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ m.content }} {% endfor %}"
)


def test_messages_that_cannot_be_templated_are_bad_rows(caplog):
    chat = {**PAIR, "prompt": [{"role": "user", "content": "w5"}]}
    with pytest.raises(
        ValueError,
        match=r"^Row 1 of chat.jsonl cannot be used: it holds messages, but the tokenizer has no chat template; "
        "expected",
    ):
        tokenize([chat], name="chat.jsonl")
    rows = [
        chat,
        {
            **PAIR,
            "prompt": [{"role": "system", "content": "w4"}, {"role": "user", "content": "w5"}],
        },
    ]
    with pytest.raises(
        ValueError,
        match=r"^Row 2 of the data cannot be used: the chat template refuses its messages: System role not supported",
    ):
        tokenize(rows, word_tokenizer(chat_template=REFUSES))
    assert len(tokenize(rows, word_tokenizer(chat_template=REFUSES), on_bad_row="skip")) == 1
    assert caplog.messages == ["Dropped 1 of 2 comparisons of the data: bad row (1)."]


def test_tokenized_rows_stay_as_they_are():
    (stored,) = tokenize([{"chosen_ids": [1, 5, 6, 2], "rejected_ids": [1, 5, 7, 7, 2]}])
    assert whole_sequences(stored) == [[1, 5, 6, 2], [1, 5, 7, 7, 2]]
    assert stored["shared_prefix"] == [1, 5]
    (cut,) = tokenize(
        [{"chosen_ids": [1, 5, 6, 2], "rejected_ids": [1, 5, 7, 7, 2]}],
        max_length=4,
        on_overlong="truncate_prompt",
    )
    assert whole_sequences(cut) == [[1, 6, 2], [1, 7, 7, 2]]
    (nested,) = tokenize(
        [{"chosen_ids": [1, 5, 6], "rejected_ids": [1, 5, 6, 2]}],
        max_length=3,
        on_overlong="truncate_prompt",
    )
    assert whole_sequences(nested) == [[1, 6], [1, 6, 2]]


def test_tokenized_rows_that_do_not_end_are_reported(caplog):
    tokenize(
        [
            {"chosen_ids": [1, 5, 6, 2], "rejected_ids": [1, 5, 7]},
            {"chosen_ids": [1, 5, 6, 2], "rejected_ids": [1, 5, 7, 2]},
        ]
    )
    assert caplog.messages == [
        "1 of 2 comparisons of the data have token ids that do not end with <eos> (2) as texts do; rewards are "
        "still read at their last token."
    ]


@pytest.mark.parametrize(
    "row, from_scores, margins",
    [
        (PAIR, False, [0]),
        ({**PAIR, "margin": 1.5}, False, [1.5]),
        ({**PAIR, "margin": None}, False, [0]),
        ({**PAIR, "score_chosen": 8.5, "score_rejected": 6}, False, [0]),
        ({**PAIR, "score_chosen": 8.5, "score_rejected": 6}, True, [2.5]),
        ({**PAIR, "score_chosen": 8.5, "score_rejected": 6, "margin": 1}, True, [1]),
        ({"prompt": "w5", "responses": [" w6", " w7", " w8"], "scores": [1, 4, 1]}, True, [3, 3]),
        (
            {"prompt": "w5", "responses": [" w6", " w7", " w8"], "scores": [1, 4, 2]},
            True,
            [3, 2, 1],
        ),
    ],
)
def test_margins_are_those_of_the_row_or_on_request_of_the_scores(row, from_scores, margins):
    (stored,) = tokenize([{**row, "weight": 0.5, "source": "s"}], margin_from_scores=from_scores)
    pairs = ranked_pairs(stored["ranks"])
    assert len(pairs) == len(stored["margins"])
    assert stored["weight"] == 0.5
    assert stored["source"] == "s"
    assert sorted(stored["margins"], reverse=True) == margins
    if len(pairs) == 3:  # 4 above 2 and 1, then 2 above 1, whatever the order of the pairs
        assert dict(zip(pairs, stored["margins"])) == {(1, 0): 3, (1, 2): 2, (2, 0): 1}


def test_ids_and_texts_without_meaning_are_refused():
    with pytest.raises(
        ValueError,
        match="Row 1 of the data cannot be used: it holds the token id 64; the tokenizer has the ids 0 to 63",
    ):
        tokenize([{"chosen_ids": [1, 64], "rejected_ids": [1]}])
    with pytest.raises(ValueError, match=r"a response without any token \(1\)"):
        tokenize([{"prompt": "", "chosen": "", "rejected": "w5"}], ends_with_eos=False)


def test_margins_from_scores_need_scores():
    with pytest.raises(ValueError, match="margin_from_scores is on, but there are no scores"):
        tokenize([PAIR], margin_from_scores=True)


def test_what_is_dropped_is_counted_and_reported(caplog):
    rows = [PAIR, {**PAIR, "rejected": "w7 " * 9}, {**PAIR, "rejected": "w6"}]
    rows = [
        {"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]], "scores": [1, 0]}
        for row in rows
    ]
    rows.append({"prompt": "w5 ", "responses": ["w6", "w7"], "scores": [1, 1]})
    with caplog.at_level(logging.DEBUG, "rlhf_reward"):
        kept = tokenize(rows, max_length=8)
    assert [whole_sequences(example) for example in kept] == [[[5, 6, 2], [5, 7, 2]]]
    assert kept[0]["length"] == 3
    *examples, total = [message for message in caplog.messages if "the data" in message]
    assert total == (
        "Dropped 3 of 4 comparisons of the data: longer than 8 tokens (1), winner and loser are the same tokens (1), "
        "all responses tie (1)."
    )
    assert [example.split(" of ")[0] for example in examples] == ["Row 2", "Row 3", "Row 4"]
    assert examples[0].endswith("11 tokens")
    with pytest.raises(
        ValueError, match=r"None of 4 comparisons of rows is left: longer than 2 tokens \(4\)"
    ):
        tokenize(rows, max_length=2, name="rows")


def test_nothing_dropped_is_reported_too(caplog):
    with caplog.at_level(logging.INFO, "rlhf_reward"):
        tokenize([PAIR], max_length=3)  # exactly as long
    assert caplog.messages == ["All 1 comparisons of the data are kept whole."]


def test_empty_responses_are_kept_counted_and_reported(tmp_path, caplog):
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\nw5 ,w6,w7\nw5 ,,w7\nw5 ,w6,\n")
    rows = load_rows(str(tmp_path / "rows.csv"))
    warning = (
        "2 of 3 comparisons of {} have an empty response, the first in row 2; they are used like any other. "
        "If a value is missing there, leave out such rows."
    )
    with caplog.at_level(logging.INFO, "rlhf_reward"):
        for _ in range(2): # the second is from the cache
            assert len(tokenize_rows(rows, word_tokenizer(), 9, name="rows.csv")) == 3
        evaluate(Rule(lambda prompt, response: float(len(response))), rows, name="the test set")
    assert caplog.messages == 2 * [warning.format("rows.csv")] + [warning.format("the test set")]


def test_which_responses_are_empty():
    def is_empty(row):
        return has_empty_response(to_comparison(row))

    question = [{"role": "user", "content": "w5"}]
    answer = [{"role": "assistant", "content": ""}]
    call = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "w6", "arguments": {}}}]}]
    assert is_empty({"prompt": question, "chosen": answer, "rejected": call})
    assert not is_empty({"prompt": question, "chosen": call, "rejected": call})
    assert not is_empty({"chosen": "w5", "rejected": "w5 w6"}) # of whole texts, one may begin another
    assert is_empty({"chosen": "w5", "rejected": ""})
    assert not is_empty({"chosen_ids": [5], "rejected_ids": [5, 6]})


def test_ties_are_kept_for_losses_that_ask_for_them():
    tie = {"prompt": "w5", "response_a": " w6", "response_b": " w7", "winner": "tie"}
    kept = [*tokenize([PAIR], keep_ties=True), *tokenize([tie], keep_ties=True)]
    assert [example["ranks"] for example in kept] == [[1, 2], [1, 1]]
    assert kept[1]["margins"] == []


def test_the_oldest_tokens_of_the_prompt_are_removed_first(caplog):
    tokenizer = with_template("<bos> $A")
    rows = [
        # 1 + 4 + 2 + 1 tokens at most
        {"prompt": "w3 w4 w5 w6", "responses": [" w7 w8", " w9", " w7"], "scores": [3, 2, 1]},
        {"prompt": "w3", "chosen": " w7", "rejected": " w8"},
        {"prompt": "w3", "chosen": " w7 w7 w7 w7 w7", "rejected": " w8"},
    ]
    expected = [
        [[1, 5, 6, 7, 8, 2], [1, 5, 6, 9, 2], [1, 5, 6, 7, 2]],
        [[1, 3, 7, 2], [1, 3, 8, 2]],
    ]
    kept = []
    for row in rows[:2]:
        kept += tokenize([row], tokenizer, 6, on_overlong="truncate_prompt")
    assert [whole_sequences(example) for example in kept] == expected
    assert [example["length"] for example in kept] == [6, 4]
    assert caplog.messages[0] == "Cut the prompt of 1 of 1 comparisons of the data."
    with pytest.raises(ValueError, match=r"longer than 6 tokens without the prompt \(1\)"):
        tokenize(rows[2:], tokenizer, 6, on_overlong="truncate_prompt")
    with pytest.raises(
        ValueError, match="Row 1 of the data has 8 tokens; expected at most 6. Allow more"
    ):
        tokenize(rows[:1], tokenizer, 6, on_overlong="error")


@settings(max_examples=40, deadline=None)
@given(prompts_and_responses, st.integers(3, 40))
@pytest.mark.parametrize("family", FAMILIES)
def test_responses_stay_whole_when_prompts_are_cut(family, prompt_and_responses, max_length):
    "The rest is the end of the whole sequence, and contains all of the response's text."
    prompt, responses = prompt_and_responses
    tokenizer = TOKENIZERS[family]
    comparison = to_comparison(
        {"prompt": prompt, "responses": responses, "scores": list(range(len(responses)))}
    )
    prompt_ids, *sequences = encode(
        [render(text, tokenizer) for text in (comparison.prompt, *whole_texts(comparison))],
        tokenizer,
    )
    if max(map(len, sequences)) <= max_length:
        return
    cut = truncate_prompt(sequences, prompt_ids, max_length, tokenizer)
    shortest_cut = max(map(len, sequences)) - max_length
    if cut is None:
        return
    assert max(map(len, cut)) == max_length
    assert {len(old) - len(new) for old, new in zip(sequences, cut)} == {shortest_cut}
    for old, new, response in zip(sequences, cut, comparison.responses):
        begin = old[0] == tokenizer.bos_token_id
        assert new[:begin] == old[:begin]
        assert (old[begin:])[shortest_cut:] == new[begin:]
        content = response if isinstance(response, str) else response[-1]["content"]
        decoded = tokenizer.decode(
            new, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert content.strip() in decoded


def test_options_are_checked():
    for option in ("on_overlong", "on_bad_row"):
        with pytest.raises(ValueError, match=f"{option} is 'cut'; expected one of"):
            tokenize([PAIR], **{option: "cut"})


def test_bad_rows_stop_or_are_skipped_and_counted(caplog):
    rows = [PAIR, {**PAIR, "chosen": None}, {**PAIR, "rejected": None}]
    with pytest.raises(
        ValueError,
        match=r"^Row 2 of rows.jsonl cannot be used: found None as chosen; .*on_bad_row='skip'",
    ):
        tokenize(rows, name="rows.jsonl")
    with caplog.at_level(logging.DEBUG, "rlhf_reward"):
        assert len(tokenize(rows, on_bad_row="skip", name="rows.jsonl")) == 1
    assert caplog.messages[-1] == "Dropped 2 of 3 comparisons of rows.jsonl: bad row (2)."
    assert any(
        "Row 3 of rows.jsonl: bad row; Row 3 of rows.jsonl cannot be used: found None" in message
        for message in caplog.messages
    )


def test_a_stream_gives_what_a_table_gives(tmp_path, caplog):
    rows = [{**PAIR, "chosen": f"w{8 + n % 5} " * (1 + n % 4)} for n in range(50)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    stream = tokenize_rows(
        load_rows(str(path), streaming=True), word_tokenizer(), 4, name="rows.jsonl"
    )
    assert isinstance(stream, IterableDataset)
    assert list(stream) == tokenize(rows, max_length=4)
    logged = [message for message in caplog.messages if "so far" in message]
    # at 1, at 10, and next at 100
    assert logged == [
        f"Dropped {count} of {seen} comparisons of rows.jsonl so far: longer than 4 tokens ({count})."
        for count, seen in ((1, 3), (10, 20))
    ]
    renamed = load_rows(str(path), columns={"chosen": "rejected"}, streaming=True)
    assert next(iter(renamed)) == {"prompt": "w5 ", "chosen": "w7"}


def test_rows_of_a_stream_may_differ_in_their_columns(tmp_path):
    rows = [PAIR] * 1100 + [
        {**PAIR, "margin": 1.5, "extra": {"a": 1}},
        {"prompt": "w5 ", "responses": ["w6", "w7", "w8"], "ranks": [1, 2, 2], "weight": 3},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    streamed = list(
        tokenize_rows(load_rows(str(tmp_path / "rows.jsonl"), streaming=True), word_tokenizer(), 9)
    )
    assert len(streamed) == 1102
    assert streamed[1100]["margins"] == [1.5]
    assert streamed[1101]["ranks"] == [1, 2, 2]
    assert streamed[1101]["weight"] == 3
    assert streamed == list(
        tokenize_rows(load_rows(str(tmp_path / "rows.jsonl")), word_tokenizer(), 9)
    )


def test_several_processes_give_what_one_gives(tmp_path):
    rows = [{**PAIR, "chosen": f"w{8 + n % 5} " * (1 + n % 4)} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = load_rows(str(tmp_path / "rows.jsonl"))
    assert tokenize_rows(read, word_tokenizer(), 4, num_proc=2).to_list() == tokenize(
        rows, max_length=4
    )


def test_a_model_trains_on_a_stream(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({**PAIR, "chosen": f"w{8 + n}"}) for n in range(20)))
    model = RewardModel(save_language_model("llama", tmp_path / "base"), dropout=0.0, device="cpu")
    before = model.score.weight.clone()
    args = RewardConfig(
        str(tmp_path / "run"),
        max_steps=4,
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        learning_rate=1e-2,
    )
    RewardTrainer(
        model, args, train_dataset=load_rows(str(path), streaming=True), processing_class=word_tokenizer()
    ).train()
    assert not torch.equal(before, model.score.weight)


def test_changed_code_is_not_answered_from_the_cache(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(json.dumps(PAIR))
    rows = load_rows(str(tmp_path / "rows.jsonl"))
    tokenizer = word_tokenizer()
    first, again = (tokenize_rows(rows, tokenizer, 9) for _ in range(2))
    monkeypatch.setattr("rlhf_reward.tokens.CACHE_VERSION", CACHE_VERSION + 1)
    after = tokenize_rows(rows, tokenizer, 9)
    assert first._fingerprint == again._fingerprint != after._fingerprint


def test_longer_wins_counts_equal_lengths_half():
    tokenized = Dataset.from_list(
        [{"rests": [[1], [1, 2]], "ranks": [2, 1]}, {"rests": [[1], [2]], "ranks": [1, 2]}]
    )
    assert longer_wins(tokenized) == 0.75
