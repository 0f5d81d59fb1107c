"""Models as folders of released names: one table a family, and the files themselves."""

from model.weights.files import load_pretrained, save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]
