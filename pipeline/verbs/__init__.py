"""The verbs of the command line, one function each; loaded only when called."""
