"A new checkpoint is complete, or it does not exist, and nothing of anyone else is removed."
import os
import shutil
from pathlib import Path

import pytest

from rlhf_reward.new_folder import changed_checkpoint, check_folder, check_new_folder, new_folder
from rlhf_reward.new_folder import replaced_checkpoint


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write(part):
    assert part.is_dir() and not any(part.iterdir())
    (part / "model").write_text("whole")
    (part / "inner").mkdir()
    (part / "inner" / "file").touch()


WRITTEN = ["inner", "inner/file", "model"]


@pytest.mark.parametrize("name", ["new", "a/b/new", "empty", ".", "dots.in.name", "[a] *"])
def test_files_appear_together(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    if name == ".":
        monkeypatch.chdir("empty") # which may be a disk of its own, that cannot be renamed
    inode = Path(name).stat().st_ino if Path(name).exists() else None
    for problem in (OSError("full"), KeyboardInterrupt()):
        with pytest.raises(type(problem)):
            with new_folder(name) as part:
                write(part)
                raise problem
        assert not list(tmp_path.rglob("model")) and not list(tmp_path.rglob("*.part"))
        assert Path(name).exists() == (inode is not None)
    with new_folder(name) as part:
        write(part)
        assert not Path(name, "model").exists()
    assert files(Path(name)) == WRITTEN and not list(tmp_path.rglob("*.part"))
    assert inode in (None, Path(name).stat().st_ino)


def test_what_is_there_stays(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "other.part").mkdir()
    before = files(tmp_path)
    for name in ("file", "full", "other"):
        for check in (check_new_folder, check_folder):
            with pytest.raises(FileExistsError, match="exists.*expected"):
                check(tmp_path / name)
        with pytest.raises(FileExistsError), new_folder(tmp_path / name):
            raise AssertionError("not reached")
    with pytest.raises(OSError), new_folder(tmp_path / "late") as part:
        write(part)
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "theirs").touch()
    assert files(tmp_path / "late") == ["theirs"]
    shutil.rmtree(tmp_path / "late")
    assert files(tmp_path) == before


def test_a_checkpoint_is_changed_in_place_or_in_a_copy(tmp_path):
    own = tmp_path / "own"
    write_own = ["checkpoint-1/model", "model", "uncertainty/heads"]
    for name in write_own:
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text(name)
    (tmp_path / "link").symlink_to(own)
    for name in (own, tmp_path / "link", own / ".." / "own"):
        assert check_folder(name, own)
        with changed_checkpoint(None, name, own) as folder:
            assert folder == Path(name)
    for copy in (tmp_path / "copy", own / "copy", own / "[c]"):
        assert not check_folder(copy, own)
        with pytest.raises(OSError, match="full"), changed_checkpoint(None, copy, own):
            raise OSError("full")
        assert not copy.exists()
        with changed_checkpoint(None, copy, own) as folder:
            (folder / "added").touch()
        assert files(copy) == ["added", "model", "uncertainty", "uncertainty/heads"]
        shutil.rmtree(copy)

    class Model:
        def save_pretrained(self, folder, tokenizer):
            (Path(folder) / "saved").write_text(tokenizer)

    scorer = type("Scorer", (), {"model": Model(), "tokenizer": "words"})
    for name in (None, "org/of-a-hub"):
        with changed_checkpoint(scorer, tmp_path / "hub", name) as folder:
            (folder / "added").touch()
        assert files(tmp_path / "hub") == ["added", "saved"]
        shutil.rmtree(tmp_path / "hub")


def write_model(folder, text):
    "A whole checkpoint; another text has other shards."
    (folder / "templates").mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json", "templates/one", f"model-{text}.safetensors"):
        (folder / name).write_text(text)


def texts(folder):
    "Contents of the checkpoint in a folder; None if nothing opens it, since it has no config."
    if not (folder / "config.json").exists():
        return None
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def model_of(text):
    return dict.fromkeys(["config.json", "tokenizer.json", "templates/one", f"model-{text}.safetensors"], text)


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "a/base"
    with replaced_checkpoint(folder) as part:
        write_model(part, "old")
        assert texts(folder) is None
    assert texts(folder) == model_of("old")
    (folder / "notes").write_text("mine")
    for problem in (OSError("full"), KeyboardInterrupt()):
        with pytest.raises(type(problem)), replaced_checkpoint(folder) as part:
            write_model(part, "new")
            raise problem
        assert texts(folder) == {**model_of("old"), "notes": "mine"}
    with replaced_checkpoint(folder) as part:
        write_model(part, "new")
        assert texts(folder)["tokenizer.json"] == "old"
    assert texts(folder) == {**model_of("new"), "notes": "mine"}
    assert not list(folder.glob(".*"))


class Killed(BaseException):
    pass


def test_a_kill_while_files_are_moved_leaves_nothing_that_opens(tmp_path, monkeypatch):
    "After each number of moved files; the next run then replaces all. A killed process does not tidy up."
    replace = os.replace
    outcomes = []
    for allowed in range(5):
        folder = tmp_path / str(allowed)
        with replaced_checkpoint(folder) as part:
            write_model(part, "old")
        left = [None] * allowed

        def killed(source, target):
            if not left:
                raise Killed
            left.pop()
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            try:
                with replaced_checkpoint(folder) as part:
                    write_model(part, "new")
            except Killed:
                pass
        outcomes.append(texts(folder))
        with replaced_checkpoint(folder) as part:
            assert not any(part.iterdir())
            write_model(part, "new")
        assert texts(folder) == model_of("new")
    assert outcomes == [None, None, None, None, model_of("new")]
