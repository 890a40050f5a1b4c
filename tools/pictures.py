"""
Make the pictures in docs/assets/ again, each from a real run: a terminal, a report, the page of the server, curves.

    python tools/pictures.py --model FOLDER --train pairs_train.jsonl --eval pairs_eval.jsonl

FOLDER is SmolLM2-135M-Instruct; the files have `prompt`, `chosen`, `rejected` as strings. One reward model is fitted by
the recipe `head`, evaluated and served, another is trained for its curves: seven minutes of one core. This requires
Chromium, playwright, Pillow and the extras `plots` and `serve`. Where trackio is installed, its page is pictured too.
The runs stay in runs/pictures/, and what is there is not run again.
"""
import argparse
import contextlib
import html
import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

ASSETS = Path("docs/assets").resolve()
WORK = Path("runs/pictures").resolve()
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SCHEMES = ("light", "dark")

FIT = f"""rlhf_reward train head --model {MODEL} --num_hidden_layers 20 --dataset pairs.jsonl
--eval_dataset heldout.jsonl --output_dir my-reward-model"""
EVALUATE = "rlhf_reward evaluate --model my-reward-model --data heldout.jsonl --output report"
SERVE = "rlhf_reward serve --model my-reward-model --port"
TRAIN = f"""rlhf_reward train --model {MODEL} --num_hidden_layers 20 --freeze_layers 16 --pooling mean --bf16
--dataset short_pairs.jsonl --eval_dataset short_heldout.jsonl --eval_strategy steps --eval_steps 10 --logging_steps 10
--learning_rate 1e-4 --lr_scheduler_type cosine --save_steps 1000 --output_dir curves"""


# ----- runs


def write_rows(source, target, most, max_characters):
    "Write the first rows of a file whose prompt with the longer response has so many characters at most."
    rows = []
    for line in Path(source).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        length = len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"]))
        if length <= max_characters:
            rows.append(line + "\n")
    (WORK / target).write_text("".join(rows[:most]), encoding="utf-8")


def words_of(command):
    "Return the command as this interpreter runs it."
    return [sys.executable, "-m", *command.split()]


def environment():
    paths = [str(ASSETS.parents[1]), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRACKIO_DIR": str(WORK / "trackio")}
    return {**os.environ, **own, "TQDM_DISABLE": "1"}


def printed_by(command, output):
    "Return what a command prints. It runs once: `output` is what it writes, next to which its text is kept."
    kept = WORK / f"{output}.txt"
    if not kept.exists():
        done = subprocess.run(
            words_of(command),
            cwd=WORK,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{command}\n{done.stdout}")
        kept.write_text(done.stdout, encoding="utf-8")
    return kept.read_text(encoding="utf-8")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def served(words, port, path):
    "Run a server until the end of the block, which begins with its first answer."
    process = subprocess.Popen(words, cwd=WORK, env=environment(), stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address + path, timeout=5)
                break
            if process.poll() is not None:
                sys.exit(f"The server ended with status {process.returncode}: {' '.join(words)}")
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(30)


# ----- a terminal

COLUMNS = 100
LINE, WIDTH, MARGIN = 19, 7.83, 20  # pixels of a line, of a character and around the text
FONTS = "ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace"
COMMAND, TEXT, WINDOW = "#7ee787", "#e6edf3", "#161b22"


def terminal_lines(command, printed):
    "Return (color, text) of each line of a terminal with 100 columns."
    typed = textwrap.wrap(f"$ {' '.join(command.split())}", COLUMNS - 2, subsequent_indent="    ")
    lines = [(COMMAND, line + " \\" * (line != typed[-1])) for line in typed]
    for line in printed.strip("\n").split("\n"):
        lines += [(TEXT, part) for part in textwrap.wrap(line, COLUMNS) or [""]]
    return lines


def terminal_svg(command, printed, label):
    "Return a picture of a terminal in which a command was typed and has printed something."
    lines = terminal_lines(command, printed)
    width, height = round(COLUMNS * WIDTH + 2 * MARGIN), LINE * len(lines) + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">',
        f'<rect width="{width}" height="{height}" rx="8" fill="{WINDOW}"/>',
        f'<g font-family="{FONTS}" font-size="13">',
    ]
    for number, (color, line) in enumerate(lines):
        if line:
            shown = html.escape(line).replace(" ", "\u00a0")  # a browser would join spaces
            position = f'x="{MARGIN}" y="{MARGIN + 14 + LINE * number}" textLength="{len(line) * WIDTH:.1f}"'
            parts.append(f'<text {position} lengthAdjust="spacingAndGlyphs" fill="{color}">{shown}</text>')
    return "\n".join([*parts, "</g>", "</svg>", ""])


# ----- pages


def save_small(png, target):
    "Save a screenshot with 128 colors, at most 150 kB."
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    picture.save(target, optimize=True)
    size = target.stat().st_size
    if size > 150_000:
        sys.exit(f"{target} has {size} bytes; expected at most 150,000. Take a smaller part of the page.")


def take_pictures(browser, address, name, width, prepare=None, height=None):
    "Take a page in both schemes, after `prepare` was called with it: all of it, or its upper part."
    for scheme in SCHEMES:
        page = browser.new_page(
            viewport={"width": width, "height": height or 300}, color_scheme=scheme, device_scale_factor=2
        )
        page.goto(address)
        page.wait_for_load_state("networkidle")
        if prepare is not None:
            prepare(page)
        save_small(page.screenshot(full_page=height is None), ASSETS / f"{name}-{scheme}.png")
        page.close()


def rank_example(page):
    "Rank the example of the page."
    page.get_by_role("button", name="Fill in an example").click()
    page.get_by_role("button", name="Rank", exact=True).click()
    page.wait_for_selector("#ranked:not([hidden])")


def take_trackio(browser):
    "Take the page of trackio, which has one scheme."
    port = free_port()
    os.environ["GRADIO_SERVER_PORT"] = str(port)
    show = "import trackio; trackio.show('huggingface', open_browser=False, block_thread=True)"
    with served([sys.executable, "-c", show], port, "") as address:
        page = browser.new_page(viewport={"width": 1000, "height": 760}, device_scale_factor=1.5)
        page.goto(f"{address}?project=huggingface")
        page.wait_for_timeout(8000)  # milliseconds, in which it draws its plots
        save_small(page.screenshot(), ASSETS / "trackio.png")


# ----- curves

COLORS = {"light": ("#1f2328", "#0072b2", "#d55e00"), "dark": ("#e6edf3", "#56b4e9", "#e69f00")}
CHANCE = {"loss": 0.6931, "accuracy": 0.5}


def draw_curves(history, scheme, target):
    "Draw loss and accuracy by step, in training and on held-out rows, on a transparent ground."
    import matplotlib.pyplot as plt

    text, *colors = COLORS[scheme]
    settings = {"text.color": text, "axes.labelcolor": text, "axes.edgecolor": text, "xtick.color": text}
    with plt.rc_context({**settings, "ytick.color": text, "svg.hashsalt": "curves", "font.size": 11}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(6, 2.9), layout="constrained")
        for axes, metric in ((left, "loss"), (right, "accuracy")):
            axes.axhline(CHANCE[metric], color="#808080", linewidth=1)
            for name, label, color in zip((metric, f"eval_{metric}"), ("training", "held out"), colors):
                points = [(log["step"], log[name]) for log in history if name in log]
                axes.plot(*zip(*points), "o-", markersize=4, color=color, label=label)
            axes.set(xlabel="step", ylabel=metric)
            axes.spines[["top", "right"]].set_visible(False)
        left.legend(frameon=False)
        figure.savefig(target, transparent=True, metadata={"Date": None})
        plt.close(figure)


# ----- all of it


def run_all(arguments):
    "Run what the pictures show, and take them."
    from playwright.sync_api import sync_playwright

    WORK.mkdir(parents=True, exist_ok=True)
    if not (WORK / MODEL).exists():  # the commands have the name of the hub
        (WORK / MODEL).parent.mkdir(exist_ok=True)
        (WORK / MODEL).symlink_to(arguments.model.resolve())
    write_rows(arguments.train, "pairs.jsonl", 300, 1000)
    write_rows(arguments.eval, "heldout.jsonl", 200, 1000)
    write_rows(arguments.train, "short_pairs.jsonl", 600, 500)
    write_rows(arguments.eval, "short_heldout.jsonl", 200, 500)
    printed = printed_by(FIT, "my-reward-model")
    label = "The output of rlhf_reward train head in a terminal"
    (ASSETS / "terminal.svg").write_text(terminal_svg(FIT, printed, label), encoding="utf-8")
    printed_by(EVALUATE, "report")
    with_trackio = importlib.util.find_spec("trackio") is not None
    printed_by(TRAIN + " --report_to " + ("trackio" if with_trackio else "none"), "curves")
    (state,) = WORK.glob("curves/checkpoint-*/trainer_state.json")
    history = json.loads(state.read_text())["log_history"]
    for scheme in SCHEMES:
        draw_curves(history, scheme, ASSETS / f"curves-{scheme}.svg")

    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        take_pictures(browser, (WORK / "report/report.html").as_uri(), "report", 520, height=940)
        port = free_port()
        with served(words_of(f"{SERVE} {port}"), port, "health") as address:
            take_pictures(browser, address, "ranking", 520, rank_example)
        if with_trackio:
            take_trackio(browser)
        browser.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help=f"folder of {MODEL}")
    parser.add_argument("--train", type=Path, required=True, help="JSON Lines of comparisons to train on")
    parser.add_argument("--eval", type=Path, required=True, help="JSON Lines of comparisons with other prompts")
    run_all(parser.parse_args())
