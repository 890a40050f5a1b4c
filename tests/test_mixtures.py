"Several sets as one: what is drawn, in which order, what each row means there, and runs on them."
import datetime
import json
import random
import re
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from datasets import Dataset
from test_runs import assert_same_tensors, distributed, make, ragged, seen_rows
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from rlhf_reward import RewardModel, Scorer, load_rows, tokenize_rows
from rlhf_reward.audit import audit
from rlhf_reward.cli import main, parse_train, train
from rlhf_reward.cli.train_data import training_sets
from rlhf_reward.columns import column_verdicts
from rlhf_reward.evaluation import evaluate
from rlhf_reward.loading import hold_out
from rlhf_reward.mixed_rows import NotKept, from_json, own_row, row_name, to_json
from rlhf_reward.mixtures import drawn_rows, mix_rows
from rlhf_reward.packing import pack_comparisons
from rlhf_reward.rows import read_row, to_comparison
from rlhf_reward.steps import StepRecords
from rlhf_reward.synthetic import synthetic_texts, tiny_decoder
from rlhf_reward.targets import names_from_bytes
from rlhf_reward.verdicts import UnclearVerdict

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("base"), [*synthetic_texts(), "iron tin + = 0 1 2 3 4 5 6 7 8 9"])


def pairs(name, number):
    return [{"prompt": f"{name} {n} = ", "chosen": f"iron {n}", "rejected": f"tin {n}"} for n in range(number)]


def messages(name, number):
    rows = []
    for row in pairs(name, number):
        rows.append({
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        })
    return rows


def drawn_of(mixture):
    return [(row["dataset"], row["dataset_row"]) for row in mixture]


# ----- shares and the draw

def test_shares_hold_and_as_many_rows_are_drawn_as_they_allow():
    draw = random.Random(0)
    for _ in range(300):
        names = [f"set {n}" for n in range(draw.randint(1, 5))]
        sizes = {name: draw.choice((draw.randint(50, 300), draw.randint(10_000, 100_000))) for name in names}
        parts = [draw.randint(1, 20) for _ in names]
        shares = {name: float(Fraction(part, sum(parts))) for name, part in zip(names, parts)}
        counts = drawn_rows(sizes, shares)
        total = sum(counts.values())
        assert all(0 < counts[name] <= sizes[name] for name in names)
        assert all(abs(counts[name] - total * shares[name]) < 1 for name in names)
        # one row more of all would need more of some set than it has
        assert any((total + 1) * shares[name] > sizes[name] - 1e-6 for name in names)
    assert drawn_rows({"a": 3, "b": 9}) == {"a": 3, "b": 9}
    assert drawn_rows({"a": 7, "b": 3}, {"a": 0.7, "b": 0.3}) == {"a": 7, "b": 3}  # exact, not by floats
    assert drawn_rows({"a": 10, "b": 10, "c": 10}, dict.fromkeys("abc", 0.33)) == {"a": 10, "b": 10, "c": 10}


@pytest.mark.parametrize("shares, problem", [
    ({"a": 0.7}, "expected one for each set: a, b"),
    ({"a": 0.7, "b": 0.3, "c": 0.1}, "expected one for each set: a, b"),
    ({"a": 0.7, "b": 0.2}, r"the shares sum to 0\.9 \(0\.7 \+ 0\.2\); expected a sum of 1"),
    ({"a": 7, "b": 3}, "the shares sum to 10"),
    ({"a": 1.0, "b": 0.0}, r"the share of b is 0\.0; expected a number above 0\. Leave out a set"),
    ({"a": 1.5, "b": -0.5}, "the share of b is -0.5"),
    ({"a": 0.7, "b": float("nan")}, "the share of b is nan"),
    ({"a": True, "b": 0.3}, "the share of a is True"),
    ({"a": 0.999, "b": 0.001}, r"has 10 row\(s\), since a has only 10, and none of them would be of b"),
])
def test_shares_that_make_no_mixture_are_refused(shares, problem):
    with pytest.raises(ValueError, match=problem):
        drawn_rows({"a": 10, "b": 10}, shares)


def test_an_epoch_of_any_mixture_has_each_drawn_row_once():
    "And the same ones for the same seed; every part of it has the sets by their shares."
    draw = random.Random(1)
    for seed in range(6):
        names = [f"set {n}" for n in range(draw.randint(2, 4))]
        sets = {}
        for name in names:
            make_rows = draw.choice((pairs, messages))
            sets[name] = Dataset.from_list(make_rows(name, draw.randint(10, 40)))
        parts = [draw.randint(1, 3) for _ in names]
        shares = {name: part / sum(parts) for name, part in zip(names, parts)} if seed % 3 else None
        mixture = mix_rows(sets, shares, seed)
        drawn = drawn_of(mixture)
        counts = drawn_rows({name: len(rows) for name, rows in sets.items()}, shares)
        assert len(set(drawn)) == len(drawn) == sum(counts.values())
        for name in names:
            numbers = [number for dataset, number in drawn if dataset == name]
            assert len(numbers) == counts[name] and numbers == sorted(numbers)
            assert 1 <= min(numbers) and max(numbers) <= len(sets[name])
            early = drawn[:len(drawn) // 2]
            assert abs(sum(dataset == name for dataset, _ in early) - counts[name] / 2) <= 2
        for row in mixture:
            own = sets[row["dataset"]][row["dataset_row"] - 1]
            assert read_row(row, 1) == to_comparison({**own, "source": row["dataset"]})
        assert drawn_of(mix_rows(sets, shares, seed)) == drawn
        if shares and any(counts[name] < len(sets[name]) for name in names):
            assert drawn_of(mix_rows(sets, shares, seed + 100)) != drawn


def test_streams_give_each_row_at_most_once_until_the_first_is_used_up():
    tables = {"sums": Dataset.from_list(pairs("sums", 300)), "chats": Dataset.from_list(messages("chats", 40))}
    streams = {name: rows.to_iterable_dataset() for name, rows in tables.items()}
    whole = drawn_of(mix_rows(streams))
    assert sorted(whole) == sorted(drawn_of(mix_rows(tables)))
    mixture = mix_rows(streams, {"sums": 0.7, "chats": 0.3})
    drawn = drawn_of(mixture)
    assert len(set(drawn)) == len(drawn) and ("chats", 40) in drawn
    for end in range(1, len(drawn) + 1):
        assert abs(sum(name == "sums" for name, _ in drawn[:end]) - 0.7 * end) < 1
    for name in streams: # in the order of the set
        numbers = [number for dataset, number in drawn if dataset == name]
        assert numbers == list(range(1, len(numbers) + 1))
    assert drawn == drawn_of(mixture) == drawn_of(mix_rows(streams, {"sums": 0.7, "chats": 0.3}))
    shuffled = mixture.shuffle(0, buffer_size=50)
    first = drawn_of(shuffled)
    assert first == drawn_of(mixture.shuffle(0, buffer_size=50))
    shuffled.set_epoch(1)
    second = drawn_of(shuffled)
    assert sorted(first) == sorted(second) == sorted(drawn) and first != second
    state = None
    for number, row in enumerate(mixture, start=1):
        if number == 20:
            state = mixture.state_dict()
            break
    resumed = mix_rows(streams, {"sums": 0.7, "chats": 0.3})
    resumed.load_state_dict(state)
    assert drawn_of(resumed) == drawn[20:]


def folders_of_files(folder, names=("sums", "chats")):
    "Return streams of three files each, the rows of one file as they are numbered in it."
    streams = {}
    for name in names:
        (folder / name).mkdir()
        for number in range(3):
            rows = pairs(f"{name} {number}", 4)
            (folder / name / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        streams[name] = load_rows(str(folder / name), streaming=True)
    return streams


def test_workers_leave_out_no_row_of_a_mixture_of_streams(tmp_path):
    "A stream divides its files among the workers, and only one worker reads the mixture."
    mixture = mix_rows(folders_of_files(tmp_path))
    drawn = drawn_of(mixture)
    assert len(set(drawn)) == 24
    assert drawn_of(DataLoader(mixture, batch_size=None, num_workers=2)) == drawn


def test_the_files_of_one_stream_are_shuffled_and_its_rows_keep_their_numbers(tmp_path):
    stream = mix_rows({"sums": folders_of_files(tmp_path)["sums"]})
    assert stream.num_shards == 3
    by_name = {}
    for row in stream:
        by_name[row_name(row["dataset_row"])] = json.loads(row["row_as_json"])["prompt"]
    assert len(by_name) == 12 and list(by_name)[3:5] == ["4 of file 1", "1 of file 2"]
    assert by_name["2 of file 3"] == "sums 2 1 = "
    shuffled = stream.shuffle(1, buffer_size=1)
    order = drawn_of(shuffled)
    assert order != drawn_of(stream) and sorted(order) == drawn_of(stream)
    assert sorted(drawn_of(DataLoader(shuffled, batch_size=None, num_workers=2))) == drawn_of(stream)
    (tmp_path / "sums/1.jsonl").write_text('{"prompt": "p", "chosen": 3, "rejected": "tin"}\n')
    rows = mix_rows({"sums": load_rows(str(tmp_path / "sums"), streaming=True)})
    with pytest.raises(ValueError, match="^Row 1 of file 2 of sums cannot be used"):
        list(map(read_row, rows, range(100)))
    (tmp_path / "sums/1.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"line 1 is not JSON .* of \S+sums/1.jsonl"):
        list(load_rows(str(tmp_path / "sums"), streaming=True))


# ----- rows keep their meaning

def test_sets_of_any_columns_and_files_mix_and_each_row_reads_as_in_its_set(tmp_path):
    "Whole texts have no prompt, though others have; numbers as verdicts mean in each set what its own column shows."
    arena = {"prompt": "p ", "response_a": "iron", "response_b": "tin"}
    whole = [{"chosen": f"sum {n}: iron", "rejected": f"sum {n}: tin"} for n in range(4)]
    rated = [{"prompt": f"r {n} ", "responses": ["iron", "tin", "lead"], "scores": [0.5, n, -1]} for n in range(4)]
    ids = [{"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, n]} for n in range(8, 12)]
    asked = [f"\n\nHuman: {n}?\n\nAssistant:" for n in (1, 2)]
    hh = [{"chosen": f"{prompt} iron", "rejected": f"{prompt} tin"} for prompt in asked]
    openai = []
    for n in range(3):
        row = {"input": {"messages": [{"role": "user", "content": f"{n}?"}]}}
        for key, text in (("preferred_output", "iron"), ("non_preferred_output", "tin")):
            row[key] = [{"role": "assistant", "content": text}]
        openai.append(row)
    sets = {
        "whole.jsonl": whole,
        "from 0": [{**arena, "winner": n % 2} for n in range(4)],
        "from 1": [{**arena, "winner": 1 + n % 2} for n in range(4)],
        "words.csv": [{**arena, "winner": ("model_a", "tie")[n % 2], "source": f"own {n}"} for n in range(4)],
        "rated": rated,
        "soft": [{**arena, "preference": share} for share in (0.7, 1.0, 0.5)],
        "attributes": [{**rated[0], "scores": None, "ratings": {"helpful": [1, 2, None], "correct": [3, 1, 2]}}],
        "ids": ids,
        "messages.parquet": [{**row, "weight": 2.5, "tools": None} for row in messages("m", 4)],
        "hh": hh,
        "openai.jsonl": openai,
    }
    loaded = {}
    streams = {}
    for name, rows in sets.items():
        table = Dataset.from_list(rows)
        path = tmp_path / name
        if name.endswith(".parquet"):
            table.to_parquet(path)
        elif name.endswith(".csv"):
            table.to_csv(path, index=False)
        else:
            path.write_text("\n".join(map(json.dumps, rows)))
        loaded[name] = load_rows(str(path)) if path.suffix else table
        streams[name] = load_rows(str(path), streaming=True) if path.suffix else table.to_iterable_dataset()
    for mixture in (mix_rows(loaded), mix_rows(streams)):
        rows = list(mixture)
        assert len(rows) == sum(map(len, sets.values()))
        for row in rows:
            name, number = row["dataset"], row["dataset_row"]
            own = to_comparison(loaded[name][number - 1], column_verdicts(loaded[name]))
            assert read_row(row, 1) == replace(own, source=own.source or name)
            assert read_row(row, 1).whole == own.whole
    with pytest.raises(UnclearVerdict, match="winner of b"):
        mix_rows({"a": loaded["from 0"], "b": Dataset.from_list([{**arena, "winner": 1}] * 3)})
    with pytest.raises(ValueError, match="found Dataset, IterableDataset to mix; expected sets by name, all"):
        mix_rows({"a": loaded["whole.jsonl"], "b": streams["hh"]})
    with pytest.raises(ValueError, match="found list to mix"):
        mix_rows({"a": whole})


def test_numbers_that_are_none_stay_errors_in_a_mixture():
    "JSON has no NaN; a table of JSON values would make it null, as if no rating was given."
    rated = Dataset.from_list([{"prompt": "p", "responses": ["a", "b"], "scores": [float("nan"), 1.0]}])
    with pytest.raises(ValueError, match="Row 1 of rated cannot be used: found nan as scores"):
        read_row(mix_rows({"rated": rated})[0], 1)
    text = Dataset.from_list([{"prompt": "5", "chosen": "6", "rejected": "null"}])
    assert read_row(mix_rows({"text": text})[0], 1).responses == ("6", "null")


def test_values_that_json_lacks_are_the_same_in_a_mixture(tmp_path):
    "Each value is kept with its type, so that a row is read as in its set."
    zone = datetime.timezone(datetime.timedelta(hours=2))
    values = {
        "day": datetime.date(2024, 2, 29),
        "at": datetime.datetime(2024, 2, 29, 23, 59, 59, 999999),
        "at_zone": datetime.datetime(1, 1, 1, tzinfo=zone),
        "time": datetime.time(1, 2, 3, 4),
        "took": datetime.timedelta(days=-3, microseconds=7),
        "rating": Decimal("4.50"),
        "bytes": b"\x00\xff",
        "nanoseconds": pd.Timestamp("2024-02-29T01:02:03.123456789"),
        "nested": [{"on": datetime.date(1999, 1, 1), "rlhf_reward.kept": ["date", "no"]}, [Decimal("NaN")]],
        "text": '{"rlhf_reward.kept": ["bytes", "AA=="]}',
        "numbers": [1, 0.1, True, None, -0.0],
    }
    read = from_json(to_json(values))
    assert repr(read) == repr(values)
    arrays = from_json(to_json({"a": np.float32(0.5), "b": np.arange(3), "c": np.int64(2 ** 62), "d": np.bool_(True)}))
    assert repr(arrays) == repr({"a": 0.5, "b": [0, 1, 2], "c": 2 ** 62, "d": True})
    once = from_json(to_json({"picture": object(), "set": {1}}))
    assert once == {"picture": NotKept("object"), "set": NotKept("set")} == from_json(to_json(once))
    # of tables and streams, each row reads as it does alone: the same comparison, or the same error
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    rated = {"prompt": "p", "responses": ["a", "b"]}
    for row in (
        {**pair, "created": datetime.datetime(2024, 1, 1), "day": datetime.date(2024, 1, 1), "blob": b"x"},
        {**rated, "scores": [Decimal("1.5"), Decimal("0.25")]},
        {**pair, "weight": Decimal("0.5")},
        {**pair, "prompt": b"bytes"},
        {**pair, "chosen": datetime.date(2024, 1, 1)},
    ):
        table = Dataset.from_list([row])
        for rows in (table, table.to_iterable_dataset()):
            mixed = next(iter(mix_rows({"one": rows, "two": rows})))
            results = []
            for own in (table[0], mixed):
                try:
                    results.append(replace(read_row(own, 1, "one"), source=None))
                except ValueError as error:
                    results.append(str(error))
            assert results[0] == results[1]
            assert repr(own_row(mixed, 1)[0]) == repr(table[0])


# ----- messages

def test_messages_name_the_row_and_its_set(base, tmp_path, caplog):
    caplog.set_level("DEBUG", "rlhf_reward")
    tokenizer = AutoTokenizer.from_pretrained(base)
    bad = pairs("chats", 6)
    bad[3] = {**bad[3], "chosen": None}
    long = pairs("sums", 8)
    long[6]["chosen"] = "iron " * 40
    sets = {"sums": Dataset.from_list(long), "chats": Dataset.from_list(bad)}
    mixture = mix_rows(sets)
    with pytest.raises(ValueError, match="^Row 4 of chats cannot be used: found None as chosen"):
        tokenize_rows(mixture, tokenizer, 32)
    with pytest.raises(ValueError, match="^Row 7 of sums has .* tokens"):
        tokenize_rows(mixture, tokenizer, 32, on_overlong="error", on_bad_row="skip")
    tokenized = tokenize_rows(mixture, tokenizer, 32, on_bad_row="skip", name="the mixture")
    assert "Dropped 1 of 8 comparisons of sums: longer than 32 tokens (1)." in caplog.text
    assert "Dropped 1 of 6 comparisons of chats: bad row (1)." in caplog.text
    assert "Row 7 of sums: longer" in caplog.text and "Row 4 of chats: bad row" in caplog.text
    kept = sorted((row["dataset"], row["row"]) for row in tokenized)
    assert kept == [*(("chats", n) for n in (1, 2, 3, 5, 6)), *(("sums", n) for n in (1, 2, 3, 4, 5, 6, 8))]
    with pytest.raises(ValueError, match="None of 14 .* is left: of sums longer than 2 .*; of chats .*bad row"):
        tokenize_rows(mixture, tokenizer, 2, on_bad_row="skip")
    caplog.clear()
    streams = {name: rows.to_iterable_dataset() for name, rows in sets.items()}
    assert len(list(tokenize_rows(mix_rows(streams), tokenizer, 32, on_bad_row="skip"))) == 12
    assert "Dropped 1 of 4 comparisons of chats so far: bad row (1)." in caplog.text
    sound = mix_rows({"sums": sets["sums"].select(range(6)), "chats": sets["chats"].select(range(3))})
    with pytest.raises(ValueError, match="^Row 1 of sums has no scores, which the loss regression learns"):
        make(base, tmp_path, sound, loss="regression")
    batch = pack_comparisons(list(tokenize_rows(sound, tokenizer, 32)))
    records = StepRecords()
    records.add(3, batch, torch.zeros(9, 2), torch.tensor([0.0] * 7 + [torch.nan] * 2))
    with pytest.raises(ValueError, match=r"step 3 .*, of 2 .* \(row 3 of chats, 6 of sums of the training set\)"):
        records.check_losses()


def test_an_audit_of_several_sets_finds_faults_across_them(tmp_path, capsys):
    sums, chats = pairs("sums", 8), messages("chats", 5)
    opposite = {**sums[2], "chosen": sums[2]["rejected"], "rejected": sums[2]["chosen"]}
    chats.append({**chats[0], "chosen": None})
    sets = {"sums.jsonl": sums, "chats.parquet": chats, "more.jsonl": [{**opposite, "source": "tins"}, sums[4]]}
    report = audit({name: Dataset.from_list(rows) for name, rows in sets.items()})
    assert report["bad_row_examples"][0].startswith("Row 6 of chats.parquet cannot be used")
    assert (report["duplicates"], report["contradictions"], report["comparisons"]) == (1, 2, 15)
    found = "\n".join(report["problems"] + report["notes"])
    assert "the same as an earlier row (row 2 of more.jsonl)" in found
    assert "B above A, for one prompt (row 3 of sums.jsonl, 1 of more.jsonl)" in found
    assert {name: part["comparisons"] for name, part in report["by_dataset"].items()} == {
        "sums.jsonl": 8, "chats.parquet": 5, "more.jsonl": 2
    }
    assert report["by_source"]["tins"]["comparisons"] == 1 and report["by_source"]["more.jsonl"]["comparisons"] == 1
    files = []
    for name in ("sums.jsonl", "more.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, sets[name])))
        files.append(str(tmp_path / name))
    with pytest.raises(SystemExit) as end:
        main(["audit", *files])
    printed = capsys.readouterr().out
    assert end.value.code == 1 and f"8 rows of the form prompt, chosen, rejected in {files[0]}" in printed
    with pytest.raises(SystemExit):
        main(["audit", files[0], "--against", files[1], "--against", files[0]])
    assert "8 of 8 comparisons: a prompt of the other rows (leakage)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="sums.jsonl is given more than once"):
        main(["audit", files[0], files[0]])
    unclear = {"a": Dataset.from_list([{"prompt": "p", "response_a": "a", "response_b": "b", "winner": 1}] * 2)}
    assert "winner of a" in audit({**unclear, "b": Dataset.from_list(sums)})["problems"][0]


def test_no_prompt_is_in_both_parts_whichever_set_it_is_from(base):
    "As a string and as a message, in other case and spaces."
    shouted = [{**row, "prompt": row["prompt"].upper() + " "} for row in pairs("sums", 30)]
    sets = {"sums": pairs("sums", 30), "shouted": shouted, "asked": messages("sums", 30), "chats": messages("chats", 9)}
    mixture = mix_rows({name: Dataset.from_list(rows) for name, rows in sets.items()})
    train_rows, eval_rows = hold_out(mixture, 0.3, seed=0)

    def prompts(rows):
        return {(row["dataset"] == "chats", row["dataset_row"]) for row in rows}

    assert not prompts(train_rows) & prompts(eval_rows)
    assert len(train_rows) + len(eval_rows) == len(mixture) == 99
    assert len(eval_rows) > 2 * len(prompts(eval_rows))


# ----- training and evaluation

def sets_to_train_on():
    sums = pairs("sums", 24)
    chats = [{**row, "source": f"part {n % 2}"} for n, row in enumerate(pairs("chats", 10))]
    return {"data/sums.jsonl": Dataset.from_list(sums), "org/chats": Dataset.from_list(chats)}


def seen_steps(trainer, checkpoint=None):
    "Train; return the rows of each step, with their sets."
    compute_loss = trainer.compute_loss
    steps = []

    def noted(model, inputs, **more):
        if model.training:
            names = names_from_bytes(inputs["datasets"])
            steps.append([f"{number} of {name}" for number, name in zip(inputs["rows"].tolist(), names)])
        return compute_loss(model, inputs, **more)

    trainer.compute_loss = noted
    trainer.train(resume_from_checkpoint=checkpoint)
    return steps


def test_metrics_of_each_set_are_those_of_its_rows_alone(base, tmp_path):
    sets = sets_to_train_on()
    mixture = mix_rows(sets)
    trainer = make(base, tmp_path, mixture, mixture, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    metrics = trainer.evaluate()
    for name, path in (("sums.jsonl", "data/sums.jsonl"), ("chats", "org/chats")):
        alone = trainer.evaluate(sets[path])
        own = {key: value for key, value in metrics.items() if key.startswith(f"eval_{name}_")}
        assert own[f"eval_{name}_pairs"] == len(sets[path]) and len(own) >= 14
        for key, value in own.items():
            assert value == pytest.approx(alone[key.replace(f"{name}_", "")], abs=1e-5)
            assert value == pytest.approx(logged[key], abs=1e-5)
    assert not [key for key in alone if "chats" in key]  # of one set nothing is repeated
    predicted = trainer.predict(mixture).metrics
    assert predicted["test_chats_accuracy"] == pytest.approx(metrics["eval_chats_accuracy"])


def test_an_evaluation_has_figures_by_set_and_by_source(base):
    scorer = Scorer(RewardModel(base, 0.0, "cpu"), AutoTokenizer.from_pretrained(base))
    sets = sets_to_train_on()
    bad = Dataset.from_list([{"prompt": "p ", "chosen": "iron", "rejected": None}])
    found = evaluate(scorer, mix_rows({**sets, "bad": bad}), on_bad_row="skip")
    assert {name: part["comparisons"] for name, part in found.report["datasets"].items()} == {
        "data/sums.jsonl": 24, "org/chats": 10
    }
    assert {name: part["comparisons"] for name, part in found.report["sources"].items()} == {
        "data/sums.jsonl": 24, "part 0": 5, "part 1": 5
    }
    assert found.report["left_out"]["first"].startswith("Row 1 of bad cannot be used")
    for mistake in found.mistakes():
        row = sets[mistake["dataset"]][mistake["row"] - 1]
        assert row["prompt"] == mistake["prompt"] and row["chosen"] == mistake["chosen"]["text"]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_mixture_resumes_to_the_same_weights(base, tmp_path, streamed):
    "In the first pass and in a later one; each step sees the same rows of the same sets, with dropout."
    sets = sets_to_train_on()
    if streamed:
        sets = {name: rows.to_iterable_dataset() for name, rows in sets.items()}

    def new_trainer(folder):
        rows = mix_rows(sets, {"data/sums.jsonl": 0.6, "org/chats": 0.4}, seed=5)
        if streamed:
            rows = rows.shuffle(7, buffer_size=8)
        return make(
            base, folder, rows, model=RewardModel(base, 0.2, "cpu"), max_steps=8, save_strategy="steps", save_steps=2
        )

    whole = new_trainer(tmp_path / "whole")
    steps = seen_steps(whole)
    steps_of_pass = next(number for number, rows in enumerate(steps, start=1) if len(rows) < 8)
    assert steps_of_pass in (2, 3, 4)
    first = sum(steps[:steps_of_pass], [])
    assert len(set(first)) == len(first)
    for step in (2, 6) if streamed else (4,):
        resumed = new_trainer(tmp_path / f"resumed-{step}")
        assert seen_steps(resumed, str(tmp_path / f"whole/checkpoint-{step}")) == steps[step:], step
        assert_same_tensors(resumed.model.state_dict(), whole.model.state_dict())


def test_two_processes_see_the_steps_of_one(base, tmp_path, python):
    "With tables and with streams."
    sets = {"even": ragged(20), "odd": ragged(9)}
    tables = mix_rows(sets, {"even": 0.6, "odd": 0.4}, seed=3)
    for data in ("mixture", "streams"):
        script = [Path(__file__).with_name("note_rows.py"), base, data]
        distributed(python, script, tmp_path / data)
        seen = seen_rows(tmp_path / data)
        steps = [seen[step] for step in range(6)]
        drawn = sorted(f"{number} of {name}" for name, number in drawn_of(tables))
        if data == "streams":
            streams = {name: table.to_iterable_dataset() for name, table in sets.items()}
            rows = mix_rows(streams, {"even": 0.6, "odd": 0.4}).shuffle(3, buffer_size=10)
            drawn = sorted(f"{number} of {name}" for name, number in drawn_of(rows))
        else:
            rows = tables
        assert [len(rows) for rows in steps] == 2 * [8, 8, len(drawn) - 16]
        assert sorted(sum(steps[:3], [])) == drawn == sorted(sum(steps[3:], []))
        trainer = make(base, tmp_path / "one", rows, max_steps=6)
        assert [sorted(step) for step in seen_steps(trainer)] == steps


# ----- the command line

QUICK = ["--max_length", "32", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--max_steps", "1"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, pairs("sums", 40))))
    Dataset.from_list(messages("chats", 30)).to_parquet(folder / "chats.parquet")
    asked = [{**row, "question": row["prompt"], "prompt": "unused"} for row in pairs("asked", 20)]
    Dataset.from_list(asked).to_csv(folder / "asked.csv", index=False)
    (folder / "template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    return folder


def test_a_list_of_sets_with_shares_in_yaml_and_on_the_command_line(base, files, tmp_path, caplog, capsys):
    caplog.set_level("INFO", "rlhf_reward")
    config = {
        "model": base,
        "output_dir": str(tmp_path / "out"),
        "chat_template": str(files / "template.jinja"),
        "dataset": [
            {"name": str(files / "sums.jsonl"), "share": 0.5},
            {"name": str(files / "chats.parquet"), "share": 0.3},
            {"name": str(files / "asked.csv"), "share": 0.2, "columns": {"prompt": "question"}},
        ],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = train([str(tmp_path / "config.yaml"), *QUICK])
    assert "The mixture has 80 rows in an epoch: 40 of 40" in caplog.text and "16 of 20 of" in caplog.text
    assert metrics["eval_pairs"] == 8 == sum(metrics.get(f"eval_{name}_pairs", 0) for name in (
        "sums.jsonl", "chats.parquet", "asked.csv"
    ))
    assert "  sums.jsonl: " in capsys.readouterr().out
    card = (tmp_path / "out/README.md").read_text()
    assert all(str(files / name) in card for name in ("sums.jsonl", "chats.parquet", "asked.csv"))
    options = ["--model", base, "--output_dir", str(tmp_path / "out"), *QUICK]
    options += ["--chat_template", str(files / "template.jinja")]
    names = [str(files / name) for name in ("sums.jsonl", "chats.parquet")]
    streamed = ["--streaming", "--eval_dataset", *names]
    metrics = train([*options, "--dataset", *names, "--dataset_shares", "0.7", "0.3", *streamed])
    numbers = [metrics[f"eval_{name}pairs"] for name in ("", "sums.jsonl_", "chats.parquet_")]
    assert numbers == [70, 40, 30]
    with pytest.raises(SystemExit, match=r"'.*sums.jsonl' is a single file, and split is 'train'"):
        train([*options, "--dataset", *names, "--split", "train"])


@pytest.mark.parametrize("argv, problem", [
    (["--dataset", "a", "b", "--dataset_shares", "0.7"], "--dataset_shares has 1 numbers for 2 sets"),
    (["--dataset", "a", "b", "--dataset_shares", "0.7", "0.7"], r"the shares sum to 1\.4"),
    (["--dataset", "a", '{"name": "b", "share": 0.3}'], "expected one for each set: a, b"),
    (["--dataset", '{"name": "b", "share": 1}', "--dataset_shares", "1"], "expected one of them"),
    (["--dataset", "a", "--dataset_shares", "0.5"], r"the shares sum to 0\.5"),
    (["--dataset", "a", "a"], "--dataset has a more than once"),
    (["--dataset", "a", '{"name": "b", "shares": 0.3}'], "did you mean 'share'"),
    (["--dataset", "a", '{"split": "b"}'], "expected a name in it"),
    (["--dataset", "a", '{"name": "b", "columns": 3}'], "3 as columns; expected another type"),
    (["--dataset", "a", '{"name": "b"'], "is not JSON"),
    (["--dataset", "a", "--eval_dataset", '{"name": "b", "share": 1}'], "expected none: all of its rows are evaluated"),
    (["--dataset", "a", "synthetic", "--split", "train"], "--split goes with a --dataset of files"),
])
def test_sets_that_do_not_fit_together_are_refused_before_anything_is_read(tmp_path, capsys, argv, problem):
    with pytest.raises(SystemExit):
        parse_train(["--model", "m", "--output_dir", str(tmp_path), *argv])
    assert re.search(problem, " ".join(capsys.readouterr().err.split()))


def test_parts_of_one_data_set_are_sets_of_their_own(tmp_path):
    parts = ['{"name": "org/prefs", "split": "train_prefs"}', '{"name": "org/prefs", "config": "old"}']
    argv = ["--model", "m", "--output_dir", str(tmp_path), "--dataset", *parts, "--revision", "v1", "--form", "as_is"]
    job, _ = parse_train([*argv, "--split", "train_sft"])
    sets = training_sets(job)
    assert [one.label for one in sets] == ["org/prefs (v1, train_prefs)", "org/prefs (old, v1, train_sft)"]
    assert {one.form for one in sets} == {"as_is"}
