"""Names of the files and folders in a model's folder, beside its weights."""

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
BROUGHT_FILES = (TOKENIZER_CONFIG, GENERATION_CONFIG, CHAT_TEMPLATE, MORE_TEMPLATES)
"""Files and folders beside weights, config and tokenizer that are carried through."""
