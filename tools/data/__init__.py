"""From FinLoRA's files to the rows that training and evaluation read.

    fetch ─▶ rows ─▶ convert ─▶ data/chat/<task>_train.jsonl, _val.jsonl, <dataset>_test.jsonl
               │        ├ rules      labels, repairs and removals of a dataset or task
               │        ├ swap       whether two labels of a file are swapped
               │        ├ lengths    tokens of each row
               │        └ split      rows that validate
               └─▶ audit ─▶ runs/audit/, data/README.md (card)
                        ├ duplicates
                        └ formulas   computed answer keys

Each converted file has a manifest beside it. `tasks` converts all files of a task, and `join` makes
multi-task sets from their parts.
"""
