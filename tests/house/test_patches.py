import re
import shutil
from pathlib import Path

import pytest
from vllm_eagle.patches import ledger

PATCHES = list(ledger.patches())


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.name)
def test_patches_are_small_and_say_why(patch: ledger.Patch) -> None:
    assert all(patch.header[field].strip() for field in ledger.HEADER_FIELDS)
    assert "does not work" not in patch.header["Without it"]
    assert patch.num_changed_lines <= ledger.MAX_CHANGED_LINES
    assert patch.diff.count("+++ ") == 1


def test_the_readme_holds_the_generated_table() -> None:
    assert ledger.table() in Path(ledger.__file__).with_name("README.md").read_text()


@pytest.fixture
def copy_of_vllm(patch: ledger.Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    changed = Path(re.findall(r"^\+\+\+ b/(\S+)", patch.diff, re.MULTILINE)[0])
    (tmp_path / changed).parent.mkdir(parents=True)
    shutil.copy(ledger.site_packages() / changed, tmp_path / changed)
    monkeypatch.setattr(ledger, "site_packages", lambda: tmp_path)
    return tmp_path / changed


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.name)
def test_apply_and_revert_restore_the_file_byte_for_byte(patch: ledger.Patch, copy_of_vllm: Path) -> None:
    before = copy_of_vllm.read_bytes()
    assert ledger.state(patch) == "not applied"
    assert ledger.change(patch, reverse=False) == "applied"
    assert ledger.change(patch, reverse=False) == "was applied already"
    assert copy_of_vllm.read_bytes() != before
    assert ledger.change(patch, reverse=True) == "not applied"
    assert copy_of_vllm.read_bytes() == before


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.name)
def test_an_unknown_file_is_left_alone(patch: ledger.Patch, copy_of_vllm: Path) -> None:
    copy_of_vllm.write_text("something else\n")
    assert ledger.state(patch) == "does not fit this vLLM"
    with pytest.raises(ValueError, match="left as it is"):
        ledger.change(patch, reverse=False)
    assert copy_of_vllm.read_text() == "something else\n"
