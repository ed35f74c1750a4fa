"""Files of FinLoRA's rows and of chat rows, for tests."""

import json


def write_rows(path, pairs):
    """Writes (prompt, answer) pairs as FinLoRA's rows; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps({"context": prompt, "target": answer}) for prompt, answer in pairs)
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


def read_turns(path):
    """The (prompt, answer) pairs of a chat file."""
    messages = [json.loads(line)["messages"] for line in path.read_bytes().splitlines()]
    return [(user["content"], assistant["content"]) for user, assistant in messages]
