import gzip
import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from architectures import word_tokenizer
from rlhf_reward import Comparison, load_rows, tokenize_rows
from rlhf_reward.data import encode, hold_out, longer_wins, ranked_pairs, to_comparison

PAIR = {"prompt": "w5 ", "chosen": "w6", "rejected": "w7"}


@pytest.mark.parametrize("scores, ranks", [((3, 1, 2), (1, 3, 2)), ((1, 1, 0), (1, 1, 3)), ((0.5, -0.5), (1, 2)), ((True, False), (1, 2))])
def test_ranks_follow_from_scores(scores, ranks):
    responses = ("a", "b", "c")[: len(scores)]
    assert to_comparison({"prompt": "p", "responses": list(responses), "scores": list(scores), "extra": None}) == Comparison("p", responses, ranks)


def test_given_ranks_are_kept_in_their_order():
    assert to_comparison({"prompt": "p", "responses": ["a", "b", "c"], "ranks": [5, 2, 2]}).ranks == (3, 1, 1)


@pytest.mark.parametrize("verdict, ranks", [("a", (1, 2)), ("A", (1, 2)), ("model_a", (1, 2)), (1, (1, 2)), ("b", (2, 1)), ("model_b", (2, 1)), (2, (2, 1)),
                                            ("tie", (1, 1)), ("tie (bothbad)", (1, 1))])
@pytest.mark.parametrize("column", ["winner", "preference"])
def test_arena_verdicts(column, verdict, ranks):
    assert to_comparison({"prompt": "p", "response_a": "x", "response_b": "y", column: verdict}) == Comparison("p", ("x", "y"), ranks)


@pytest.mark.parametrize("chosen, rejected, prompt", [
    ("\n\nHuman: Hi\n\nAssistant: Hello you", "\n\nHuman: Hi\n\nAssistant: Hello", "\n\nHuman: Hi\n\nAssistant:"),
    ("\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D", "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: E",
     "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant:"),
    ("2 + 2 = 4", "2 + 2 = 5", "2 + 2 = "),
    ("one", "two", ""),
    ("one", "one two", "one"),
])
def test_whole_texts_are_split_at_their_prompt_and_lose_nothing(chosen, rejected, prompt):
    comparison = to_comparison({"chosen": chosen, "rejected": rejected})
    assert comparison.prompt == prompt and comparison.ranks == (1, 2)
    assert [comparison.prompt + response for response in comparison.responses] == [chosen, rejected]


@pytest.mark.parametrize("row, message", [
    ({"prompt": "p", "chosen": "c"}, r"columns \['chosen', 'prompt'\]; wanted chosen and rejected, with prompt"),
    ({**PAIR, "rejected": None}, "None where a text is wanted"),
    ({**PAIR, "prompt": [{"role": "user"}]}, "where a text is wanted"),
    ({"prompt": "p", "responses": ["a"], "scores": [1]}, r"responses \['a'\] and the scores \[1\]; wanted two lists"),
    ({"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "one number for each of at least 2 responses"),
    ({"prompt": "p", "responses": ["a", "b"], "scores": [1, None]}, "a number for each"),
    ({"prompt": "p", "responses": ["a", "b"], "scores": [1, float("nan")]}, "a number for each"),
    ({"prompt": "p", "responses": ["a", "b"], "scores": ["1", "2"]}, "a number for each"),
    ({"prompt": "p", "responses": ["a", "b"], "scores": [[1], [2]]}, "a number for each"),
    ({"prompt": "p", "responses": None, "scores": [1, 2]}, "the responses None"),
    ({"prompt": "p", "responses": ["a", "b"], "scores": 3}, "the scores 3"),
    ({"prompt": "p", "responses": "ab", "scores": [1, 2]}, "the responses 'ab'"),
    ({"prompt": "p", "responses": ["a", "b"], "ranks": [1, None]}, "the ranks .*a number for each"),
    ({"prompt": "p", "responses": ["a", "b"], "ranks": [1]}, "the ranks .1.; wanted two lists"),
    ({"prompt": "p", "response_a": "a", "response_b": "b", "winner": "left"}, "'left' as its winner; wanted one of a, 1, model_a"),
    ({"prompt": "p", "response_a": "a", "response_b": "b", "preference": 0}, "0 as its preference"),
    ({"chosen": "a", "rejected": None}, "None where a text"),
])
def test_bad_rows_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        to_comparison(row)
    for read in (lambda rows: tokenize_rows(rows, word_tokenizer(), max_length=9), hold_out):
        with pytest.raises(ValueError, match="^Row 0: "):
            read(Dataset.from_list([row]))


def with_template(template):
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    return tokenizer


@pytest.mark.parametrize("text", ["w5 w6", "w5 w6 <eos>", "w5 w6 <eos> <eos>", "<bos> w5 w6", "<bos> w5 w6 <eos>"])
@pytest.mark.parametrize("template, begin", [("$A", 0), ("<bos> $A", 1), ("$A <eos>", 0), ("<bos> $A <eos>", 1)])
def test_begin_and_end_stand_once(template, begin, text):
    "Whatever the tokenizer adds and the text brings along."
    begin = max(begin, text.startswith("<bos>"))
    assert encode(text, with_template(template)) == [1] * begin + [5, 6, 2]


def test_end_is_sep_for_encoders_and_nothing_for_tokenizers_without_one():
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    assert encode("a a", PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]")) == [1, 3, 3, 2]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert encode("a a", PreTrainedTokenizerFast(tokenizer_object=tokenizer)) == [3, 3]


def test_no_seam_between_prompt_and_response():
    "Byte-level BPE would cut 'ab' + 'ab' otherwise in one piece than in two."
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ba": 2}, [("b", "a")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    rows = Dataset.from_list([{"prompt": "ab", "chosen": "ab", "rejected": "b"}])
    assert tokenize_rows(rows, tokenizer, 9)[0]["token_ids"] == [[0, 2, 1], [0, 1, 1]]


def test_what_is_dropped_is_counted_and_said(caplog):
    rows = [PAIR, {**PAIR, "rejected": "w7 " * 9}, {**PAIR, "rejected": "w6"}]
    rows = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]], "scores": [1, 0]} for row in rows]
    rows.append({"prompt": "w5 ", "responses": ["w6", "w7"], "scores": [1, 1]})
    with caplog.at_level(logging.WARNING):
        kept = tokenize_rows(Dataset.from_list(rows), word_tokenizer(), max_length=8)
    assert kept.to_list() == [{"token_ids": [[5, 6, 2], [5, 7, 2]], "ranks": [1, 2], "length": 3}]
    assert caplog.messages == ["Dropped 3 of 4 comparisons of the data: longer than 8 tokens (1), "
                               "winner and loser are the same tokens (1), all responses tie (1)."]
    with pytest.raises(ValueError, match=r"No comparison of the rows is left of 4: longer than 2 tokens \(4\)"):
        tokenize_rows(Dataset.from_list(rows), word_tokenizer(), max_length=2, name="rows")


def test_changed_code_is_not_answered_from_the_cache(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(json.dumps(PAIR))
    rows, tokenizer = load_rows(str(tmp_path / "rows.jsonl")), word_tokenizer()

    def changed(text, tokenizer):
        return [9, *encode(text, tokenizer)]

    changed.__module__, changed.__name__, changed.__qualname__ = encode.__module__, "encode", "encode" # as an edit of the module would have it
    first, again = (tokenize_rows(rows, tokenizer, 9) for _ in range(2))
    monkeypatch.setattr("rlhf_reward.data.encode", changed)
    after = tokenize_rows(rows, tokenizer, 9)
    assert first._fingerprint == again._fingerprint != after._fingerprint
    assert after[0]["token_ids"] == [[9, *ids] for ids in first[0]["token_ids"]]


def test_a_length_at_the_limit_is_kept():
    assert len(tokenize_rows(Dataset.from_list([PAIR]), word_tokenizer(), max_length=3)) == 1


def test_held_out_prompts_are_in_one_part_only():
    rows = Dataset.from_list([{**PAIR, "prompt": str(n % 30), "chosen": str(n)} for n in range(90)])
    train, held = hold_out(rows, 0.1, seed=3)
    assert len(set(held["prompt"])) == 3 and len(held) == 9 and not set(train["prompt"]) & set(held["prompt"])
    assert sorted([*train["chosen"], *held["chosen"]]) == sorted(rows["chosen"])
    assert hold_out(rows, 0.1, seed=3)[1][:] == held[:] != hold_out(rows, 0.1, seed=4)[1][:]
    with pytest.raises(ValueError, match=r"1 different prompt\(s\)"):
        hold_out(rows.select([0]))
    with pytest.raises(ValueError, match="of which 30 would be held out"):
        hold_out(rows, 1.0)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.jsonl.gz", "rows.csv.gz", "folder"])
def test_rows_are_read_from_files(tmp_path, name):
    rows = [PAIR, {**PAIR, "chosen": "w8"}]
    path, data = tmp_path / name, Dataset.from_list(rows)
    if name == "folder":
        path.mkdir()
        data.to_json(path / "train.jsonl")
    elif ".parquet" in name:
        data.to_parquet(path)
    else:
        (data.to_csv if ".csv" in name else data.to_json)(tmp_path / "plain", **({} if ".csv" in name else {"lines": name != "rows.json"}))
        text = (tmp_path / "plain").read_bytes()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert load_rows(str(path)).to_list() == rows


def test_columns_of_other_names_are_mapped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "not this", "instruction": "p", "output_1": "a", "output_2": "b"}))
    rows = load_rows(str(path), columns={"prompt": "instruction", "chosen": "output_1", "rejected": "output_2"})
    assert to_comparison(rows[0]) == Comparison("p", ("a", "b"), (1, 2)) and sorted(rows.column_names) == ["chosen", "prompt", "rejected"]
    with pytest.raises(ValueError, match="no column 'question'; it has .*'instruction'"):
        load_rows(str(path), columns={"prompt": "question"})


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rows.txt").write_text("a")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", \n')
    with pytest.raises(FileNotFoundError, match="missing.jsonl' is not there"):
        load_rows(str(tmp_path / "missing.jsonl"))
    for name, message in (("empty.jsonl", "is empty"), ("rows.txt", "another kind"), ("broken.jsonl", "broken.jsonl' cannot be read: line 2 is not JSON")):
        with pytest.raises(ValueError, match=message):
            load_rows(str(tmp_path / name))


def test_longer_wins_counts_equal_lengths_half():
    tokenized = Dataset.from_list([{"token_ids": [[1], [1, 2]], "ranks": [2, 1]}, {"token_ids": [[1], [2]], "ranks": [1, 2]}])
    assert longer_wins(tokenized) == 0.75


SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real preference files lie beside the checkout only where they are developed")
@pytest.mark.parametrize("name, rows, pairs", [("pairs_eval.jsonl", 790, 790), ("ranked_k5.jsonl", 80, None)])
def test_real_files_are_read_whole(name, rows, pairs):
    data = load_rows(str(SHARED / name))
    comparisons = [to_comparison(row) for row in data]
    assert len(comparisons) == rows
    assert pairs is None or sum(len(ranked_pairs(comparison.ranks)) for comparison in comparisons) == pairs
