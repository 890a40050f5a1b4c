"Calibration by length: the local mean against its definition, where it is applied, and where it is refused."
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import save_chat_reward_model
from fastapi.testclient import TestClient

from rlhf_reward import RewardModel
from rlhf_reward.cli.calibrate_command import calibrate
from rlhf_reward.cli.score_command import score
from rlhf_reward.evaluation import evaluate
from rlhf_reward.length_calibration import FILE, LengthCalibration, calibrate_length, local_means, read_calibration
from rlhf_reward.length_calibration import save_calibrated
from rlhf_reward.report_summary import figure_lines
from rlhf_reward.response_tokens import marked
from rlhf_reward.rl import RewardFunction
from rlhf_reward.scoring import Scorer
from rlhf_reward.serving import make_app

PROMPT = "w3 w4"
RESPONSES = []
for count in range(60):
    RESPONSES.append(" ".join(f"w{5 + (count * word) % 50}" for word in range(count % 20)))
ROWS = [{"prompt": PROMPT, "responses": RESPONSES[start : start + 4]} for start in range(0, 60, 4)]
PAIRS = [{"prompt": PROMPT, "chosen": chosen, "rejected": other} for chosen, other in zip(RESPONSES, RESPONSES[1:6])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_reward_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def calibrated(folder, tmp_path_factory):
    "A copy of the checkpoint with its calibration."
    scorer = Scorer.from_pretrained(folder, "cpu")
    copy = tmp_path_factory.mktemp("calibrated") / "model"
    save_calibrated(scorer, calibrate_length(scorer, ROWS, "the rows", share=0.4), copy, folder)
    return str(copy)


# ----- the local mean

def by_definition(lengths, rewards, at, share):
    "The line of least weighted squares at one length, from the nearest responses (Cleveland 1979)."
    distances = abs(lengths - at)
    radius = np.sort(distances)[math.ceil(share * len(lengths)) - 1]
    weights = np.clip(1 - (distances / radius) ** 3, 0, None) ** 3
    slope, intercept = np.polyfit(lengths, rewards, 1, w=np.sqrt(weights))
    return slope * at + intercept


def test_local_means_are_weighted_lines():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 60, 300).astype(float)
    rewards = np.sin(lengths / 9) + generator.normal(size=300)
    at = np.arange(-5.0, 70)
    for share in (0.1, 0.5, 0.9):
        expected = [by_definition(lengths, rewards, length, share) for length in at]
        np.testing.assert_allclose(local_means(lengths, rewards, at, share), expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(local_means(lengths, 2 * lengths - 1, at, 0.3), 2 * at - 1, atol=1e-9) # a line stays
    # many of one length: their mean; two at the same distance: theirs
    few = local_means(np.array([3.0, 3, 3, 3, 9]), np.array([1.0, 2, 3, 2, 7]), np.array([3.0]), 0.6)
    two = local_means(np.array([1.0, 3]), np.array([0.0, 4]), np.array([1.0, 2, 3]), 1.0)
    assert (few.tolist(), two.tolist()) == ([2], [0, 2, 4])


def test_rewards_lose_what_their_length_explains():
    calibration = LengthCalibration([2, 4], [10.0, 20.0], 12.0, 0.5, "rows", 1, 2, "", "")
    sequences = [[marked([7] * length, length - own) for length, own in ((5, 2), (9, 3), (4, 4), (30, 25), (3, 1))]]
    found = calibration.apply([[1.0, 1.0, 1.0, 1.0, math.nan]], sequences)[0]
    assert found[:4] == [1 + 12 - 10, 1 + 12 - 15, 1 + 12 - 20, 1 + 12 - 20] and math.isnan(found[4])


# ----- everywhere

def test_every_way_to_a_reward_is_calibrated_on_request_alone(folder, calibrated):
    plain = Scorer.from_pretrained(calibrated, "cpu")
    scorer = Scorer.from_pretrained(calibrated, "cpu", calibrated=True)
    prompts = [PROMPT] * len(RESPONSES)
    before, after = (np.array(own.score(prompts, RESPONSES)) for own in (plain, scorer))
    assert before == pytest.approx(Scorer.from_pretrained(folder, "cpu").score(prompts, RESPONSES))
    lengths = np.array([len(response.split()) + 1 for response in RESPONSES])
    curve = json.loads(open(f"{calibrated}/{FILE}").read())
    assert set(lengths) <= set(curve["lengths"]) | {20.0}
    expected = before - np.interp(lengths, curve["lengths"], curve["means"]) + curve["mean"]
    np.testing.assert_allclose(after, expected, atol=1e-5)
    assert after.mean() == pytest.approx(before.mean(), abs=0.05 * before.std())
    explained = []
    for rewards in (before, after):
        explained.append(np.ptp(local_means(lengths.astype(float), rewards, np.arange(1.0, 21), 0.4)))
    assert explained[1] < 0.5 * explained[0]
    # one at a time, ranked, in RL, in an evaluation, and over HTTP
    assert scorer.score([PROMPT], RESPONSES[7:8]) == pytest.approx(after[7:8], abs=1e-5)
    ranked = scorer.rank(PROMPT, RESPONSES[:20])
    assert [result.reward for result in ranked] == pytest.approx(sorted(after[:20], reverse=True), abs=1e-5)
    assert RewardFunction(scorer)(prompts, RESPONSES) == pytest.approx(after, abs=1e-5)
    evaluation = evaluate(scorer, PAIRS)
    assert evaluation.responses["reward"][0] == pytest.approx(after[0], abs=1e-5)
    assert evaluation.report["length_calibration"]["data"] == "the rows"
    assert figure_lines(evaluation.report)[0] == ("Rewards calibrated by length, on", "the rows")
    assert "length_calibration" not in evaluate(plain, PAIRS).report
    request = {"prompts": prompts[:3], "responses": RESPONSES[:3]}
    with TestClient(make_app(scorer)) as client:
        answer = client.post("/score", json=request)
        assert answer.json()["rewards"] == pytest.approx(after[:3], abs=1e-5)
        assert answer.headers["x-reward-calibration"] == "length"
        assert client.get("/health").json()["length_calibration"]["data"] == "the rows"
        assert client.post("/classify", json={"input": "w3 w4 w5"}).status_code == 422 # no response is known
        tokens = client.post("/tokenize", json={"messages": [{"role": "user", "content": "w3"}]}).json()["tokens"]
        assert all(isinstance(token, int) for token in tokens)


def test_the_command_writes_a_copy_and_says_so(folder, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    output = tmp_path / "calibrated"
    options = ["--model", folder, "--data", str(data), "--output", str(output), "--device", "cpu"]
    calibrate(options)
    printed, following = capsys.readouterr()
    assert "60 in 15 rows" in printed
    assert f"Next: rlhf_reward evaluate --model {output} --calibrated --data HELD_OUT.jsonl" in following
    saved = json.loads((output / FILE).read_text())
    assert saved["data"] == str(data) and len(saved["sha256"]) == 64 and saved["responses"] == 60
    assert (output / "model.safetensors").read_bytes() == open(f"{folder}/model.safetensors", "rb").read()
    with pytest.raises(SystemExit, match="exists; expected the name of a new folder"):
        calibrate(options)
    Path(folder, "README.md").write_text("# A card")
    calibrate([*options[:5], folder, *options[6:]]) # in place
    card = Path(folder, "README.md").read_text()
    assert card.startswith("# A card\n\n## Length calibration\n\n") and f"60 responses of `{data}`" in card
    Path(folder, "README.md").unlink()
    assert json.loads(Path(folder, FILE).read_text()) == saved
    Path(folder, FILE).unlink()
    again = {**saved, "data": "the rows"}
    other = calibrate_length(Scorer.from_pretrained(folder, "cpu"), ROWS, "the rows")
    assert (other.sha256, other.means) == (again["sha256"], pytest.approx(again["means"])) # of the rows, not their file
    written = tmp_path / "scored.jsonl"
    score(["--model", str(output), "--calibrated", "--data", str(data), "--output", str(written), "--device", "cpu"])
    assert "calibrated by length" in capsys.readouterr().out
    rewards = Scorer.from_pretrained(output, "cpu", calibrated=True).score([PROMPT] * 4, ROWS[0]["responses"])
    assert json.loads(written.read_text().splitlines()[0])["rewards"] == pytest.approx(rewards, abs=1e-5)
    with pytest.raises(SystemExit, match=f"has no {FILE}"):
        score(["--model", folder, "--calibrated", "--data", str(data), "--output", str(tmp_path / "x.jsonl")])


def test_what_cannot_be_calibrated_is_refused(folder, calibrated, tmp_path):
    scorer = Scorer.from_pretrained(folder, "cpu")
    with pytest.raises(ValueError, match="no two lengths"):
        calibrate_length(scorer, [{"prompt": PROMPT, "responses": [" w5", " w6"]}])
    with pytest.raises(ValueError, match="Row 1 .*does not show where its response begins.*on_bad_row"):
        calibrate_length(scorer, [{"text": "w3 w4"}, *ROWS])
    assert calibrate_length(scorer, [{"text": "w3 w4"}, *ROWS], on_bad_row="skip").rows == len(ROWS)
    assert not scorer.reader.marks and scorer.score([None], ["w3 w4"])
    for share in (0, 1.5):
        with pytest.raises(ValueError, match="share is"):
            calibrate_length(scorer, ROWS, share=share)
    with pytest.raises(ValueError, match="calibrated already"):
        calibrate_length(Scorer.from_pretrained(calibrated, "cpu", calibrated=True), ROWS)
    with pytest.raises(ValueError, match=f"has no {FILE}.*rlhf_reward calibrate"):
        Scorer.from_pretrained(folder, "cpu", calibrated=True)
    model = RewardModel.from_pretrained(calibrated, device="cpu", dtype=torch.bfloat16)
    assert read_calibration(calibrated, model).data == "the rows" # in another dtype too
    model.score.weight.data[0, 0] += 0.5
    with pytest.raises(ValueError, match="another reward head.*calibrate again"):
        read_calibration(calibrated, model)
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError, match="exists; expected the name of a new folder"):
        save_calibrated(scorer, None, tmp_path, folder)
