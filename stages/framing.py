"""How a document is framed: the tokens that begin and end it, here and in every released model."""

BOS_ID = 0
EOS_ID = 1
BOS_TOKEN = "<|begin_of_text|>"
EOS_TOKEN = "<|end_of_text|>"
