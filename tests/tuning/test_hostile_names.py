"""Names that a hostile store may hold: none is a path, Markdown or mathtext, and no secret leaves the process."""

from __future__ import annotations

import ast
import base64
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from made_study import LAMBDAS, TASKS, log_trial
from markdown_it import MarkdownIt

from llgbm.runtime import exit_status, redact, redact_forms
from tuning.report.__main__ import main
from tuning.report.names import Renaming, escaped, file_name, label, one_line
from tuning.tracking.runs import ERROR_TAG
from tuning.tracking.store import store_errors, usable_uri, with_login, without_login
from tuning.tracking.study import StudyTracker

HOSTILE = (
    "![x](secret.png)",
    "![x](/etc/hostname)",
    "[click](javascript:alert(1))",
    "<script>alert(1)</script>",
    "costs $5 and $x_{",
    "one $",
    "$x_{$",
    r"\frac{$",
    "a|b",
    "`code` and ```",
    "two\nlines\n\n# a heading",
    "\x1b[31mred\x07",
    "\u202eright to left",
    "_all_ __init__ **bold** ~~gone~~",
    "&copy; &#x3c;",
    "../../escaped",
    "=1+1",
    "x" * 500,
    "日本語 \U0001f600",
)
SECRET = "s3cret-pass-word"


@pytest.mark.parametrize("name", HOSTILE)
def test_an_escaped_name_is_shown_as_it_is(name: str) -> None:
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    for text in (escaped(name), f"- {escaped(name)} keeps", f"| a |\n|---|\n| {escaped(name)} |"):
        kinds = {child.type for token in parser.parse(text) for child in token.children or ()}
        assert kinds <= {"text", "text_special"}, (text, kinds)
    (inline,) = [t for t in parser.parse(f"x {escaped(name)} x") if t.type == "inline"]
    assert "".join(child.content for child in inline.children or ()) == f"x {one_line(name)} x"


def test_different_names_stay_different() -> None:
    names = Renaming(label)
    assert len({names(name) for name in ("y" * 100 + "a", "y" * 100 + "b", "a\x00", "a\x01")}) == 4


@pytest.mark.parametrize("name", [*HOSTILE, "", "..", "/", "C:\\x", ".hidden", "con\x00"])
def test_a_file_name_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    path = tmp_path / file_name(name)
    assert path.parent == tmp_path and path.resolve().parent == tmp_path.resolve()
    assert file_name(name) == Path(file_name(name)).name and not file_name(name).startswith(".")
    path.touch()


def test_a_report_of_hostile_names_comes_and_holds_nothing_of_the_disk(
    tmp_path: Path,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Another test may have made a password of a word that stands here.
    monkeypatch.setattr("llgbm.runtime._known", set())
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD", raising=False)
    place = tmp_path / "deep" / "below"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    content = b"\x89PNG the reader's own"
    for folder in (place, place / "reports", tmp_path):
        folder.mkdir(exist_ok=True)
        (folder / "secret.png").write_bytes(content)
    tracker = StudyTracker.open(None, tmp_path / "store", "llgbm")
    tracker.begin("# ![x](secret.png) $", "../../../evil", {}, {})
    tracker.log_metrics({"baseline/_ridge_ x/accuracy": 0.3})
    tasks = dict.fromkeys([*TASKS[:3], *HOSTILE[:4]], 0.5)
    for place_, name in enumerate(HOSTILE):
        log_trial(tracker, name, place_ % 2, tasks, LAMBDAS["multitask"])
    bad = log_trial(tracker, "failed", 0, tasks, LAMBDAS["multitask"])
    tracker.finish_trial("failed0", "FAILED", {ERROR_TAG: "![x](secret.png) <b>$"})
    before = {path for path in tmp_path.rglob("*") if "reports" not in path.parts}
    assert main(["latest", "--tracking-uri", tracker.tracking_uri]) == 0
    assert {path for path in tmp_path.rglob("*") if "reports" not in path.parts} == before and bad
    (written,) = [path for path in (place / "reports").iterdir() if path.is_dir()]
    page, text = (written / "report.html").read_text(), (written / "report.md").read_text()
    assert base64.b64encode(content).decode() not in page
    pictures = re.findall(r'<img src="([^"]*)"', page)
    assert len(pictures) == len(list(written.glob("*.png")))
    assert all(source.startswith("data:image/png;base64,") for source in pictures)
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inline = [child for token in tokens for child in token.children or ()]
    shown = {str(one.attrs["src"]) for one in inline if one.type == "image"}
    assert shown == {path.name for path in written.glob("*.png")}
    assert not {one.type for one in inline} & {"link_open", "html_inline"}
    assert "<script" not in page and 'href="javascript' not in page
    assert "&lt;script&gt;alert(1)" in page and "\x1b" not in page + text + capsys.readouterr().out
    assert {
        row["config"] for row in json.loads((written / "results.json").read_text())["trials"]
    } >= set(HOSTILE[:4])


ADDRESSES = (
    f"https://me:{SECRET}@host:5000/x",
    f"postgresql+psycopg2://me:{SECRET}@db.example/store",
    f"mysql://me:{SECRET}@127.0.0.1:3306/store?charset=utf8",
)


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_shown_without_its_login(address: str) -> None:
    for text in (address, f"GET {address}/api failed: 503", f"('{address}', 3)"):
        assert SECRET not in redact(text) and "me:" not in redact(text) and "://" in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        f"password={SECRET} host=db",
        f'{{"password": "{SECRET}"}}',
        f"https://host/x?token={SECRET}&a=1",
        f"Authorization: Bearer {SECRET}",
        f"s3://bucket/x?access_key={SECRET}",
    ],
)
def test_named_secrets_are_masked(text: str) -> None:
    assert SECRET not in redact(text)


def test_the_secrets_of_the_environment_are_masked_and_plain_text_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert redact(f"it was {SECRET}!") == "it was ***!"
    for text in ("sqlite:////a@b/c.db", "mail me@host", "eos_token: <|end|>", "--max-tokens=5"):
        assert redact(text) == text


def texts_of(node: ast.AST) -> str:
    """Return the text of a string of code, a word in each of its gaps; nothing for other nodes."""
    if isinstance(node, ast.JoinedStr):
        parts = (v.value if isinstance(v, ast.Constant) else "gap" for v in node.values)
        return "".join(map(str, parts))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_no_sentence_of_this_project_is_taken_for_a_secret() -> None:
    """`no end token: name one` lost its fourth word."""
    for part in ("llgbm", "tuning", "dnd_repo/workspace/dnd"):
        for path in (ROOT / part).rglob("*.py"):
            source = path.read_text()
            if redact_forms(source) != source:  # code and comments may
                texts = map(texts_of, ast.walk(ast.parse(source)))
                assert not [text for text in texts if redact_forms(text) != text], path


def test_the_login_of_a_store_lives_in_the_environment_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    clean = without_login(ADDRESSES[1])
    assert clean == "postgresql+psycopg2://db.example/store"
    assert with_login(clean) == ADDRESSES[1] and with_login("sqlite:////x") == "sqlite:////x"
    assert without_login(ADDRESSES[0]) == "https://host:5000/x"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == SECRET
    assert with_login("https://host:5000/x") == "https://host:5000/x"


def test_errors_of_a_store_and_tracebacks_hold_no_password(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    dead = f"http://me:{SECRET}@127.0.0.1:9/x"

    def fails() -> int:
        with store_errors(dead):
            raise OSError(f"Max retries exceeded with url: {dead}")

    def breaks() -> int:
        raise KeyError(dead)

    assert exit_status(fails, debug=True) == 2 and exit_status(breaks, debug=False) == 1
    assert exit_status(lambda: len(usable_uri(dead)), debug=True) == 2
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err and "Traceback" in printed.err


def test_tags_and_pickles_of_a_study_hold_no_password(study: StudyTracker) -> None:
    study.set_tags({"note": f"see {ADDRESSES[0]}"})
    run = study.client.get_run(study.parent_run_id)
    assert SECRET not in str(run.data.tags) and "https://host:5000/x" in run.data.tags["note"]
    study.client.secret = SECRET  # type: ignore[attr-defined]
    data = pickle.dumps(study)
    assert SECRET.encode() not in data
    assert pickle.loads(data).metrics() == study.metrics()


def test_a_run_is_found_though_its_name_holds_a_secret(
    study: StudyTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Secrets of the environment come and go: what runs are looked for by, or compared by, is the same with them."""
    study.begin("study", f"id-{SECRET}", {"folder": f"/data/{SECRET}"}, {})
    before = study.parent_run_id
    monkeypatch.setenv("HF_TOKEN", SECRET)
    study.begin("study", f"id-{SECRET}", {"folder": f"/data/{SECRET}"}, {"why": SECRET})
    assert study.parent_run_id == before and study.studies(f"id-{SECRET}")
    assert study.client.get_run(before).data.tags["why"] == "***"
    log_trial(study, f"with {SECRET}", 0, {TASKS[0]: 0.5}, LAMBDAS["multitask"])
    found = study.live_runs()[f"with{SECRET}0"]
    assert found.info.status == "FINISHED"


def test_a_worker_finds_the_login_again(tmp_path: Path) -> None:
    code = (
        "import sys, pickle, subprocess\n"
        "from tuning.tracking.store import usable_uri, with_login, without_login\n"
        f"clean = without_login('{ADDRESSES[1]}')\n"
        "ask = 'import sys; from tuning.tracking.store import with_login; print(with_login(sys.argv[1]))'\n"
        "print(subprocess.run([sys.executable, '-c', ask, clean], capture_output=True, text=True).stdout)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ADDRESSES[1]
