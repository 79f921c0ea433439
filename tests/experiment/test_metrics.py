"""Events that are damaged are named."""

import pytest

from b2diffurl.experiment.metrics import read_events


@pytest.mark.parametrize("line", [b'{"evenu": "update"}', b"5", b"{", b'{"event": "\xff"}'])
def test_events_that_are_damaged_are_named(tmp_path, line):
    """But for a last line without an end, as a crash leaves it."""
    path = tmp_path / "train.jsonl"
    whole = b'{"event": "update"}\n'
    path.write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(ValueError, match=r"train\.jsonl is damaged"):
        read_events(path)
    path.write_bytes(whole + b'{"event": "upd')
    assert read_events(path) == [{"event": "update"}]
