"""Text of data, models and servers, and what of the environment is secret: as it is shown on terminals and in files."""

import csv
import io

from ouro.files import UserError, explain, markdown, message, spreadsheet
from ouro.train.run_folder import model_card

import pytest
from helpers import resolved

ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202e\x85"


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
    report = {"dataset": "a | b", "rows_kept": 1, "trained_tokens": 2, "licences": licences}
    card = model_card(resolved(), report, "a/base", [{"step": 1, "loss": 2.0}])
    assert card.replace("\n", "").isprintable() and "<img" not in card and card.count("\n---\n") == 1
    assert "| data | a \\| b: 1 rows" in card and "&lt;img src=x&gt; ---: 3 rows |" in card
