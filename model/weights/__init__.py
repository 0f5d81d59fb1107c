"""Models as folders of released names: one table a family, and the files themselves.

`files.py` loads and saves them; `config.py` reads what a folder's `config.json` describes, without
torch.
"""
