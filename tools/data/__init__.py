"""From FinLoRA's files, or the user's own, to the rows that training and evaluation read.

    own file ─▶ formats ─▶ recognize ─▶ shapes ─▶ intake ─▶ data/local/ ┐
                   │                      └ labels, choices, turns      │
                   └ encodings, jsonstream, tables, hub_rows, writers   │
                                                                        ▼
    fetch ─▶ data/raw/ ───────────────────────────────────────▶ rows ─▶ convert ─▶ data/chat/

    convert uses  rules      labels, repairs and removals of a dataset or task
                  swap       whether two labels of a file are swapped
                  lengths    tokens of each row
                  split      rows that validate
    look          shows a row as the model sees it
    audit         runs/audit/ and data/README.md (card), by duplicates and formulas

Each converted file has a manifest beside it. `make new` and `make data` convert all files of a
task, and `join` makes multi-task sets from their parts.
"""
