"""Publishing: what can be known is refused before the work, and no access token is ever printed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc_transformers.cli import main as cli
from mc_transformers.hub import publish


TOKEN = "hf_" + "aB3" * 11


@pytest.fixture
def no_work(monkeypatch):
    """Neither bundles nor a Hub."""

    def work(*_, **__):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(publish, "bundle", work)
    monkeypatch.setattr(publish, "HfApi", work)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.mark.parametrize("repo_id", ["a/b/c", "me/..", "-x", "me/a--b", "me/model.git", "", "me/ö", "x" * 100])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_name_is_checked_before_the_work(no_work, capsys, repo_id, dry):
    assert cli.main(["publish", "model", *dry, "--", repo_id]) == 1
    line = capsys.readouterr().err
    assert line.startswith("mc-transformers publish: error: ") and "epo" in line and line.count("\n") == 1


def test_what_excludes_each_other_is_refused_before_the_work(no_work, capsys, monkeypatch):
    assert cli.main(["publish", "model", "me/model", "--create-pr", "--tag", "v1"]) == 1
    assert "pull request" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_ö")
    assert cli.main(["publish", "model", "me/model"]) == 1
    assert "access token" in (line := capsys.readouterr().err) and "hf_" not in line


def test_a_token_as_an_argument_is_not_echoed(no_work, capsys):
    other = "hf_" + "Zz9" * 11
    for token in (TOKEN, other):
        for argv in (["model", token], ["model", f"me/{token}"], [token, "me/.."], ["model", "me/model", token]):
            try:
                assert cli.main(["publish", *argv]) == 1
            except SystemExit as ended:  # a word too many
                assert ended.code == 2
            out, err = capsys.readouterr()
            assert err and token not in out + err
    with pytest.raises(ValueError, match="not shown"):
        publish.upload("folder", TOKEN)


@given(kind=st.sampled_from(["hf_", "hf_oauth_", "api_org_"]), rest=st.from_regex(r"\A[A-Za-z0-9]{30,60}\Z"))
def test_what_looks_like_a_token_is_hidden(kind, rest):
    assert publish.hide_tokens(f"https://user:{kind}{rest}@host/x") == "https://user:***@host/x"
    assert publish.hide_tokens("me/hf_my_first_model") == "me/hf_my_first_model"
