"""Where data lives, with the generator of the embedded default dataset."""
