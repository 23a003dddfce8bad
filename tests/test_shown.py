"""Text of data, models and servers, and what of the environment is secret: as it is shown on terminals and in files."""

import base64
import csv
import hashlib
import io
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import train_qlora
from ouro.cluster import preflight, status
from ouro.data import fetch
from ouro.data.cache import prepare
from ouro.data.report import print_report
from ouro.evaluate.models import find_adapter
from ouro.files import UNSAFE, UserError, explain, markdown, message, quoted, spreadsheet, write_atomic
from ouro.model.loading import load_tokenizer
from ouro.train.run_folder import model_card

import fabricate
import pytest
from helpers import resolved, write_jsonl
from reports import change, table, write_report

ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202e\x85"
NAME = f"a{ESCAPES}\nerror: 'b' \\"  # of a file or a folder, or what a server says


def lines_of(printed: str) -> list[str]:
    """What was printed, in which a terminal obeys nothing and NAME begins no line."""
    assert "\\x1b" in printed and not UNSAFE.search(printed)
    assert not any(line.startswith("error: 'b'") for line in printed.splitlines())
    return printed.splitlines()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("HTTPS_PROXY", "http://me:PASSWORD9@ho st:80", "cannot parse http://me:PASSWORD9@ho st:80"),
        ("https_proxy", "me:PASS#WORD9@host:80", "no scheme in me:PASS#WORD9@host:80"),
        ("ALL_PROXY", "socks5://me:P@SSWORD9@host", "cannot reach socks5://me:P@SSWORD9@host"),
        ("HF_ENDPOINT", "https://me:PASSWORD9@mirror/hf", "404 at https://me:PASSWORD9@mirror/hf/api"),
        ("HF_TOKEN", "hf_SECRETWORD9", "token hf_SECRETWORD9 is not valid"),
        ("JUDGE_API_KEY", "sk-SECRETWORD9", "401 for Bearer sk-SECRETWORD9"),
    ],
)
def test_a_message_holds_no_password_and_no_key(monkeypatch, capsys, name, value, said):
    monkeypatch.setenv(name, value)
    assert explain(UserError(f"{said}{ESCAPES}")) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "WORD9" not in told
    assert told.removesuffix("\n").isprintable() and "\\u202e" in told


def test_a_setting_is_told_on_one_line_and_a_terminal_obeys_nothing_in_it(tmp_path, capsys):
    hostile = f"{ESCAPES}\nerror: a second line"
    given = ["--system_prompt", hostile, "--dataset_path", f"/nowhere/{hostile}", "--output_dir", f"out{hostile}"]
    train_qlora.print_settings(resolved(*given), tmp_path / hostile, "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() and not line.startswith("error") for line in lines)
    assert sum("\\x1b[2J" in line and "\\nerror: a second line" in line for line in lines) == 1 + len(given) / 2


def test_no_run_is_named_with_what_a_terminal_obeys(tmp_path):
    config = tmp_path / "a\x1b[31m\nb.yaml"
    config.write_text("max_steps: 1\n")
    with pytest.raises(UserError, match="runs are named after this file: rename it"):
        resolved("--config", str(config))
    assert find_adapter(str(tmp_path / "a\x1b[31m\nb")).run.startswith("adapter-a\\x1b[31m\\nb-")


def test_a_data_report_names_its_file_on_one_line(tmp_path, capsys, in_the_repository):
    file = tmp_path / "a\x1b[31m\nerror: b.jsonl"
    write_jsonl(file, *({"prompt": f"คำถามที่ {i}", "completion": "ตอบ" * (i + 1)} for i in range(4)))
    settings = resolved("--dataset", "pairs", "--dataset_path", str(file)).settings
    print_report(prepare(settings, load_tokenizer("sample/ouro-tiny"), quiet=True)[1])
    told = capsys.readouterr().out
    assert "a\\x1b[31m\\nerror: b.jsonl" in told and not UNSAFE.search(told.translate({ord(c): "" for c in "⟦⟧"}))


def test_a_message_has_the_lines_that_it_is_given_whatever_is_in_them(capsys):
    explain(UserError(f"no {NAME}", f"  in {NAME}", "make it"))
    assert len(lines_of(capsys.readouterr().err)) == 3


def test_a_config_file_is_named_on_one_line_where_it_cannot_be_read(tmp_path, capsys):
    config = tmp_path / "a\n b.yaml"
    config.write_text("a: [")
    for file, told in ((config, "is not valid YAML"), (tmp_path / "c\n d.yaml", "No such file")):
        with pytest.raises(UserError) as refused:
            resolved("--config", str(file))
        explain(refused.value)
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line and "\\n " in line


def test_rows_that_are_not_worth_training_on_are_named_a_line_each(tmp_path, in_the_repository):
    """The lines that are meant stay, those of the folder's name do not."""
    (tmp_path / NAME).mkdir()
    file = write_jsonl(tmp_path / NAME / "rows.jsonl", *({"prompt": "ก", "completion": ""} for _ in range(9)))
    settings = resolved("--dataset", "pairs", "--dataset_path", file).settings
    with pytest.raises(UserError) as refused:
        prepare(settings, load_tokenizer("sample/ouro-tiny"), quiet=True)
    first, *places, last = lines_of(str(refused.value))
    assert first.startswith("9 of 9 rows of ") and [line.partition(":")[0] for line in places] == [
        "  rows.jsonl, line 1",
        "  rows.jsonl, line 2",
    ]
    assert last.startswith("no row of ")


def test_preflight_tells_a_check_on_one_line(tmp_path, monkeypatch, capsys, in_the_repository):
    monkeypatch.setattr(preflight, "CHECKS", (preflight.check_disk,))
    argv = ["preflight.py", "--config", "tests/smoke.yaml", "--output_dir", str(tmp_path / NAME)]
    monkeypatch.setattr("sys.argv", argv)
    preflight.main()
    assert [line.split()[:2] for line in lines_of(capsys.readouterr().out)] == [["ok", "settings"], ["ok", "disk"]]
    monkeypatch.setattr(preflight, "DISK", 1e18)
    with pytest.raises(UserError, match=r"the first: disk: .*nerror: 'b' .* are needed"):
        preflight.main()
    assert len(lines_of(capsys.readouterr().out)) == 2


def test_the_status_tells_what_slurm_and_a_log_say_on_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = NAME.replace("\n", " ")
    write_atomic("slurm/logs/jobs.tsv", f"7\ttrain\tx\t{said}\t{said}\n8\ttrain\ty\tother\tother\n")
    write_atomic("slurm/logs/8_y.err", f"srun: 1\nerror: {said}\n")
    status.print_status([["7", "PENDING", said, "train x"]])
    heading, waits, failed, why, then = lines_of(capsys.readouterr().out)
    assert waits.startswith("x ") and failed.startswith("y ") and why.startswith("    job 8: error: 'b'")


def test_what_a_hub_says_is_told_on_one_line(monkeypatch, capsys):
    info = SimpleNamespace(sha=f"\x1b\n{NAME}", siblings=[SimpleNamespace(rfilename=f"{NAME}.json", size=1)])
    monkeypatch.setattr(fetch.HfApi, "repo_info", lambda *_, **__: info)
    fetch.look_up(fetch.Download("model", "me/model", None, "model", ["*.json"]))
    assert len(lines_of(capsys.readouterr().out)) == 1
    with pytest.raises(UserError) as refused:
        fetch.look_up(fetch.Download("model", "me/model", None, "model", ["*.txt"]))
    assert len(lines_of(str(refused.value))) == 1


def test_a_command_can_be_copied_whatever_is_in_a_name():
    for name in (NAME, "a b", "ก\x85\x1bb", os.fsdecode(b"\xff'\\")):
        word = quoted(name)
        assert "\n" not in word and not UNSAFE.search(word)
        done = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True)
        assert done.stdout == os.fsencode(name)
    assert quoted(Path("/a b")) == "'/a b'"


def test_addresses_and_short_values_stay():
    said = "https://host/@me?x=1 and me@host, none"
    assert message(said) == said


def test_markdown_and_spreadsheets_obey_nothing():
    text = f"CC {ESCAPES} <img src=x>\n---\n| `x` [a](b)"
    assert markdown(text).startswith("CC \\\\x1b") and markdown(text).isprintable()
    assert markdown("<b>|*\n# x") == "&lt;b&gt;\\|\\* # x"
    for formula in ("=cmd|'/c calc'!A1", "@SUM(1)", "+1+cmd", "-1+cmd", "\t=1", "＝1"):
        file = io.StringIO()
        csv.writer(file).writerow([spreadsheet(formula)])
        assert next(csv.reader([file.getvalue()]))[0] == f"'{formula}"
    assert spreadsheet("wangchan: 2") == "wangchan: 2"


def test_a_model_card_holds_no_markup_of_the_data(tmp_path):
    licences = {f"CC {ESCAPES} <img src=x>\n---": 3}
    report = {"dataset": "a | b", "language": "th", "rows_kept": 1, "trained_tokens": 2, "licences": licences}
    card = model_card(resolved(), report, "a/base", [{"step": 1, "loss": 2.0}])
    assert card.replace("\n", "").isprintable() and "<img" not in card and card.count("\n---\n") == 1
    assert "| data | a \\| b: 1 rows" in card and "&lt;img src=x&gt; ---: 3 rows |" in card


def test_a_model_card_names_the_language_of_the_data():
    """It said Thai of an adapter trained on English, too."""
    report = {"dataset": "smol-smoltalk", "rows_kept": 1, "trained_tokens": 2, "licences": {}}
    for language, name in {"th": "Thai", "en": "English"}.items():
        card = model_card(resolved(), report | {"language": language}, "a/base", [{"step": 1, "loss": 2.0}])
        assert f"\nlanguage: {language}\n" in card and f"{name} instructions" in card


def test_no_page_or_table_of_the_report_obeys_the_text_of_data_and_models(tmp_path):
    """tests/test_report_html.py asks a browser the same."""
    formula = "=HYPERLINK(0)"
    hostile = f"{ESCAPES}<script>alert(1)</script>\n| a | b |"
    how = {"cut": 7, "refused": 5, "unparsed": 3, "inference_flops_per_token": 5e6}
    output, _ = fabricate.study(tmp_path, tasks=("mt_bench_thai",), seeds=(0,), items=20, lines=3, reply=hostile, **how)
    for file in output.rglob("data_report.json"):
        change(file, licences={formula: 1} if "ut1" in str(file) else {hostile: 2})
    next(output.glob("*ut2")).rename(output / formula)
    printed = write_report(tmp_path, "--csv", "--latex", figures=True)
    files = {
        file: file.read_text()
        for file in tmp_path.rglob("*")
        if file.suffix in (".md", ".html", ".csv", ".tex", ".svg")
    }
    assert len(files) > 10 and not any(UNSAFE.search(text) for text in (printed, *files.values()))
    page, text = (files[tmp_path / name] for name in ("report.html", "RESULTS.md"))
    assert "&lt;script&gt;alert(1)" in page and "alert(1)&lt;/script&gt;" in text and "<script" not in text
    script = page.partition("<script>")[2].partition("</script>")[0].encode()
    allowed = page.partition("script-src 'sha256-")[2].partition("'")[0]
    assert page.count("<script") == 1 and base64.b64decode(allowed) == hashlib.sha256(script).digest()
    assert '<a href="#answers">' in page and "so that it babbles" in page and "so that it babbles" in text
    tables = {file.stem: table(tmp_path, file.stem) for file in files if file.suffix == ".csv"}
    cells = [cell for rows in tables.values() for row in rows for cell in row.values()]
    assert f"'{formula}" in cells and f"'{formula}: 1" in cells and not any(cell.startswith("=") for cell in cells)
    for name in ("benchmarks", "scores"):
        assert {(row["no answer"], row["cut"], row["refused"]) for row in tables[name]} == {("3", "7", "5")}
    assert "| refused |" in text
