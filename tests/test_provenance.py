"""What made a result is named."""

import subprocess

from recurlm import provenance


def test_the_commit_is_that_of_this_source_or_the_named_one(tmp_path, monkeypatch):
    monkeypatch.delenv("RECURLM_COMMIT", raising=False)
    package = tmp_path / "src" / "recurlm" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(package))
    assert provenance.commit() == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    found = provenance.commit()
    assert len(found) == 40
    package.write_text("x = 1\n")
    assert provenance.commit() == f"{found}+changes"
    monkeypatch.setenv("RECURLM_COMMIT", "abc")
    assert provenance.commit() == "abc"
