"""From raw sources to packed token shards, problems and a tokenizer."""
