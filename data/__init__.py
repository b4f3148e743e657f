"""Supporting modules, each for one format or one kind of text."""
