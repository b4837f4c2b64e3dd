"""`growth.json` as text: JSON that says the same, a group's heads on one line; links out of it are not followed."""

import json
from pathlib import Path

import pytest

from gdagrow.errors import CheckpointError
from gdagrow.record import read_record, record_text


def test_the_text_is_the_record() -> None:
    record = {
        "signal_heads": [[[0, 0], [0, 1]], [[1, 0], [1, -1]]], "kv_groups": [0, 1], "none": [],
        "text": ["[1,  2]", "a"],
        "history": [{"kv_groups": [3]}], "name": 'odd "[\\n 1,  2 ]"',
    }  # fmt: skip
    text = record_text(record)
    assert json.loads(text) == record
    assert '"kv_groups": [0, 1],' in text
    assert "    [[0, 0], [0, 1]],\n    [[1, 0], [1, -1]]\n" in text
    assert '"[1,  2]"' in text


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "secret.json").write_text('{"history": []}')
    (tmp_path / "model" / "growth.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match=r"growth\.json is a link that leads out of its checkpoint directory"):
        read_record(tmp_path / "model")
