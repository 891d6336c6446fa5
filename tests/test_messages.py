"""The page of all messages is that of the source."""

from __future__ import annotations

from pathlib import Path

from tests.support.messages import COMMAND, PAGE, Message, messages, page

SOURCE = '''
_AGAIN = "copy it again"

def _bad(what: str) -> SlimError:
    return SlimError(f"{what} is bad", _AGAIN)

@group.command()
@click.option("--bits", help="Bits a weight.")
def squeeze(bits):
    """Make it small."""
    raise _bad("the first row")
    raise SlimError(f"{path.name}: {len(rows):,} rows", "give fewer" if rows else hint)
    observer.notify(Notice(f"done in {a_long_expression_of_something(with_arguments)}"))
'''


def test_the_page_is_up_to_date() -> None:
    current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    assert current == page(), f"docs/messages.md is out of date; write it again: {COMMAND}"


def test_what_is_read_out_of_a_source(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    assert list(messages(tmp_path / "a.py")) == [
        Message("error", "{what} is bad", "copy it again"),
        Message("help", "--bits: Bits a weight.", ""),
        Message("help", "Make it small.", ""),
        Message("error", "… the first row", ""),
        Message("error", "{path.name}: {len(rows)} rows", "give fewer"),
        Message("notice", "done in {…}", ""),
    ]
